"""Results and ledger as people read them: summary tables and one self-contained HTML page."""
