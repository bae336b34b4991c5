"""Tables of the documents, by what they show; `readme_tables.py` draws them."""
