"""Data to heal on: documents of many formats, tokenised once, cut into rows, in an order that resumes anywhere.

sources, rendering    where documents come from, and what a row of a table says
tokens, corpus        documents to tokens, and their cache
rows                  rows of one length, with what keeps attention within documents
order, loader         which rows come next, and the batches of one process
module                all of it as a LightningDataModule
"""
