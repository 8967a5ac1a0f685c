//! What an rx lcore runs: parse, demultiplex, answer.
