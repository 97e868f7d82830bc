"""Text to statistics: corpora, windows of tokens, hidden states streamed layer by layer, refit.

The mathematics of those statistics is in `methods`.
"""
