//! The write-ahead log and its readers; knows nothing of networks.
