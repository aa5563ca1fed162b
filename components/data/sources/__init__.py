"""Sources: read the documents of a data set.

base.py              TextSource and FileSource, the base classes; a custom source derives from one
text_files.py        TextFiles: local files
formats.py           the file formats: plain text, JSON, CSV, Parquet
text_io.py           opens, decompresses and decodes text; lists the compressions (COMPRESSED, _SIGNATURES)
decompression.py     the stream that decompresses
hub.py               HuggingFaceDataset
standard_library.py  StandardLibrary: the default corpus
token_files.py       TokenFiles: ids that other tools have written
"""
