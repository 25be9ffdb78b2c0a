//! Hostile front-ends and guests. Every case is one line of a table. After each case the same process serves a good
//! front-end and has lost nothing.
#![expect(clippy::unwrap_used, reason = "these are tests")]

mod messages;
mod rings;
