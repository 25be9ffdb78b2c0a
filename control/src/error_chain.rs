//! Formats an error and its causes on one line, for logs and replies.

use std::error::Error;
use std::iter::successors;

/// Joins the messages of `error` and its sources with `: `, outermost first.
pub fn error_chain(error: &dyn Error) -> String {
    let messages: Vec<_> =
        successors(Some(error), |&error| error.source()).map(ToString::to_string).collect();
    messages.join(": ")
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot start")]
    struct Outer(#[source] Middle);

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open the TAP")]
    struct Middle(#[from] io::Error);

    #[test]
    fn names_each_cause_once_outermost_first() {
        let error = Outer(io::Error::other("no such device").into());
        assert_eq!(error_chain(&error), "cannot start: cannot open the TAP: no such device");
        assert_eq!(error_chain(&io::Error::other("alone")), "alone");
    }
}
