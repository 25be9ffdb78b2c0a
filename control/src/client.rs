//! A client of a control socket: one request, one reply, in turn.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use baton_protocol::control::{MAX_LINE, Request};

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody could be reached.
    #[error("{}: cannot connect; is the process running, with this --control-socket?", path.display())]
    Connect {
        /// The control socket's path.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The connection failed.
    #[error("the control connection failed")]
    Io(#[from] io::Error),
    /// The other side closed the connection before it answered.
    #[error("the process closed the control connection without an answer")]
    Closed,
    /// The reply is longer than [`MAX_LINE`].
    #[error("the reply is longer than {MAX_LINE} bytes")]
    TooLong,
    /// A request or a reply is not what the protocol says.
    #[error("the reply is not JSON")]
    Json(#[from] serde_json::Error),
    /// The process answered that it will not.
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
    /// [`ClientError::Connect`], naming the path.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        match UnixStream::connect(path) {
            Ok(stream) => Ok(Self { stream: BufReader::new(stream) }),
            Err(source) => Err(ClientError::Connect { path: path.to_owned(), source }),
        }
    }

    /// Sends `request` and waits for its reply, for as long as the process takes.
    ///
    /// # Errors
    /// [`ClientError::Refused`] for an answer of `{"error":…}`; the others if there was no proper answer.
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

    /// The client's view of a server that answers `reply` to whatever it is asked, and closes.
    fn answered_with(reply: Vec<u8>) -> Result<serde_json::Value, ClientError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let mut stream = BufReader::new(listener.accept().unwrap().0);
            stream.read_line(&mut String::new()).unwrap();
            // The client may have had enough before the end.
            let _ = stream.get_mut().write_all(&reply);
        });
        let answer = ControlClient::connect(&path).unwrap().call(&Request::Status);
        server.join().unwrap();
        answer
    }

    #[test]
    fn a_reply_is_the_commands_own_object() {
        assert_eq!(answered_with(b"{\"a\":1}\n".to_vec()).unwrap(), serde_json::json!({"a": 1}));
    }

    #[test]
    fn improper_replies_are_errors() {
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
    fn nobody_there_is_an_error_that_names_the_path() {
        let error = ControlClient::connect(Path::new("/nonexistent/control")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/control"), "{error}");
    }
}
