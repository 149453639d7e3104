"""What peers say to each other: messages, frames, identities, tickets, transports. No torch, nothing of ours."""
