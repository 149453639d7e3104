"""From a recipe to a corpus: readers, renderers, tokenizers, shards."""
