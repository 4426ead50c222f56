"""What a sweep writes and how it is read again: Parquet schemas, writer, reader, state. No torch, no ray."""
