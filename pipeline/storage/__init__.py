"""Bytes and tables: manifests in, clips, commit records and Parquet out. The only floor that writes output."""
