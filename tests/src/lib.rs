//! What the process-level tests share.
