//! A client of a control socket: sends a request, then waits for its reply.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use baton_protocol::control::{MAX_LINE, Request};

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No process listens on the socket, or this user may not connect.
    #[error("cannot connect to {} (is a process running with this --control-socket?)", path.display())]
    Connect {
        /// The path of the control socket.
        path: PathBuf,
        /// The error of `connect(2)`.
        source: io::Error,
    },
    /// The connection failed.
    #[error("the control connection failed")]
    Io(#[from] io::Error),
    /// The process closed the connection before it replied.
    #[error("the process closed the control connection without a reply")]
    Closed,
    /// The reply is longer than [`MAX_LINE`].
    #[error("the reply is longer than {MAX_LINE} bytes")]
    TooLong,
    /// The reply is not JSON.
    #[error("the reply is not JSON")]
    Json(#[from] serde_json::Error),
    /// The process refused the request.
    #[error("{0}")]
    Refused(String),
}

/// A connection to a control socket.
#[derive(Debug)]
pub struct ControlClient {
    stream: BufReader<UnixStream>,
}

impl ControlClient {
    /// Connects to the process that serves `path`.
    ///
    /// # Errors
    /// Returns [`ClientError::Connect`] if `connect(2)` fails.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        match UnixStream::connect(path) {
            Ok(stream) => Ok(Self { stream: BufReader::new(stream) }),
            Err(source) => Err(ClientError::Connect { path: path.to_owned(), source }),
        }
    }

    /// Sends `request` and waits for the reply, without a time limit.
    ///
    /// # Errors
    /// Returns [`ClientError::Refused`] for the reply `{"error":…}`, or another error if there is no valid reply.
    pub fn call(&mut self, request: &Request) -> Result<serde_json::Value, ClientError> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line)?;

        line.clear();
        let limit = u64::try_from(MAX_LINE + 1).unwrap_or(u64::MAX);
        (&mut self.stream).take(limit).read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') {
            return Err(if line.len() > MAX_LINE { ClientError::TooLong } else { ClientError::Closed });
        }
        let reply: serde_json::Value = serde_json::from_slice(&line)?;
        match reply.get("error").and_then(serde_json::Value::as_str) {
            Some(error) => Err(ClientError::Refused(error.to_owned())),
            None => Ok(reply),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Calls a server that sends `reply` and closes the connection.
    fn answered_with(reply: Vec<u8>) -> Result<serde_json::Value, ClientError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let mut stream = BufReader::new(listener.accept().unwrap().0);
            stream.read_line(&mut String::new()).unwrap();
            // Fails if the client gives up before the end.
            let _ = stream.get_mut().write_all(&reply);
        });
        let answer = ControlClient::connect(&path).unwrap().call(&Request::Status);
        server.join().unwrap();
        answer
    }

    #[test]
    fn a_json_object_is_returned_as_the_reply() {
        assert_eq!(answered_with(b"{\"a\":1}\n".to_vec()).unwrap(), serde_json::json!({"a": 1}));
    }

    #[test]
    fn invalid_replies_are_errors() {
        type Expectation = fn(&ClientError) -> bool;
        let cases: [(&[u8], Expectation); 4] = [
            (b"", |error| matches!(error, ClientError::Closed)),
            (b"{\"a\":", |error| matches!(error, ClientError::Closed)),
            (b"hello\n", |error| matches!(error, ClientError::Json(_))),
            (b"{\"error\":\"no\"}\n", |error| matches!(error, ClientError::Refused(why) if why == "no")),
        ];
        for (reply, expected) in cases {
            let error = answered_with(reply.to_vec()).unwrap_err();
            assert!(expected(&error), "{reply:?}: {error:?}");
        }
        let error = answered_with(vec![b'x'; 2 * MAX_LINE]).unwrap_err();
        assert!(matches!(error, ClientError::TooLong), "{error:?}");
    }

    #[test]
    fn a_failed_connection_is_an_error_that_names_the_path() {
        let error = ControlClient::connect(Path::new("/nonexistent/control")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/control"), "{error}");
    }
}
