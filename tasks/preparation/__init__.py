"""Worker `prepare`: raw files to packed rows, in their final order. Neither Prefect nor torch is imported here."""
