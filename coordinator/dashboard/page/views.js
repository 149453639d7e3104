// The page's views beside its first screen, by the first word of their address; each is fetched when it is opened.

export const VIEWS = {
  peer: ["Peer", () => import("./peer.js")],
  round: ["Round", () => import("./round.js")],
  step: ["Step", () => import("./step.js")],
  steps: ["Steps", () => import("./step.js")],
  links: ["Links", () => import("./matrix.js")],
  leaderboard: ["Leaderboard", () => import("./leaderboard.js")],
  operate: ["Operate", () => import("./operate.js")],
};
