//! Tests of the control server: its clients, their limits, and its shutdown.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};

use nix::errno::Errno;
use serde_json::json;

use super::*;
use crate::client::{ClientError, ControlClient};
use crate::reply::Reply;

/// Answers `status`, `stats` with a long reply and `pause` with one that is too long. Refuses other requests.
fn handler(request: Request) -> Outcome {
    match request {
        Request::Status => Ok(json!({"state": "waiting"})),
        Request::Stats => Ok(json!({"long": "x".repeat(MAX_LINE - 100)})),
        Request::Pause => Ok(json!({"too long": "x".repeat(MAX_LINE)})),
        other => Err(refusal(format!("{other:?} is not for this process"))),
    }
}

fn started() -> (tempfile::TempDir, PathBuf, ControlServer) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control");
    let server = ControlServer::start(BoundSocket::bind(&path).unwrap(), handler).unwrap();
    (directory, path, server)
}

fn exchange(path: &Path, request: &[u8]) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.write_all(request).unwrap();
    let mut reply = String::new();
    BufReader::new(stream).read_line(&mut reply).unwrap();
    reply
}

#[test]
fn a_reply_is_one_line() {
    let (_directory, path, _server) = started();
    assert_eq!(exchange(&path, b"{\"command\":\"status\"}\n"), "{\"state\":\"waiting\"}\n");
}

#[test]
fn an_invalid_request_gets_an_error_and_the_next_one_is_served() {
    let (_directory, path, _server) = started();
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"nonsense\n{\"command\":\"dance\"}\n\xff\n{\"command\":\"status\"}\n").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut replies = String::new();
    stream.read_to_string(&mut replies).unwrap();
    let replies: Vec<_> = replies.lines().collect();
    assert_eq!(replies.len(), 4, "{replies:?}");
    assert!(replies[..3].iter().all(|reply| reply.starts_with("{\"error\":")), "{replies:?}");
    assert_eq!(replies[3], "{\"state\":\"waiting\"}");
}

#[test]
fn a_request_that_is_too_long_gets_an_error_and_the_next_one_is_served() {
    let (_directory, path, _server) = started();
    let mut request = vec![b'x'; MAX_LINE + 1];
    request.extend_from_slice(b"\n{\"command\":\"status\"}\n");
    let stream = UnixStream::connect(&path).unwrap();
    let mut writer = stream.try_clone().unwrap();
    let thread = std::thread::spawn(move || writer.write_all(&request).unwrap());
    let mut lines = BufReader::new(stream).lines();
    assert!(lines.next().unwrap().unwrap().contains("at most 65536 bytes"));
    assert_eq!(lines.next().unwrap().unwrap(), "{\"state\":\"waiting\"}");
    thread.join().unwrap();
}

#[test]
fn a_reply_that_is_too_long_is_replaced_by_an_error() {
    let (_directory, path, _server) = started();
    assert_eq!(exchange(&path, b"{\"command\":\"pause\"}\n"), "{\"error\":\"the reply is too long\"}\n");
}

#[test]
fn a_silent_client_does_not_delay_others() {
    let (_directory, path, _server) = started();
    let mut silent = UnixStream::connect(&path).unwrap();
    silent.write_all(b"{\"comm").unwrap();
    let mut first = ControlClient::connect(&path).unwrap();
    let mut second = ControlClient::connect(&path).unwrap();
    for _ in 0..10 {
        assert_eq!(first.call(&Request::Status).unwrap()["state"], "waiting");
        assert_eq!(second.call(&Request::Status).unwrap()["state"], "waiting");
    }
    // The server still serves the silent client.
    silent.write_all(b"and\":\"status\"}\n").unwrap();
    let mut reply = String::new();
    BufReader::new(silent).read_line(&mut reply).unwrap();
    assert_eq!(reply, "{\"state\":\"waiting\"}\n");
}

#[test]
fn a_client_that_reads_no_replies_does_not_delay_others() {
    let (_directory, path, _server) = started();
    let greedy = UnixStream::connect(&path).unwrap();
    greedy.set_nonblocking(true).unwrap();
    // Fills the buffers of both directions: the server has then stopped reading.
    let mut refused = 0;
    while refused < 3 {
        match nix::unistd::write(&greedy, b"{\"command\":\"stats\"}\n") {
            Ok(_) => refused = 0,
            Err(errno) => {
                assert_eq!(errno, Errno::EAGAIN);
                refused += 1;
                exchange(&path, b"{\"command\":\"status\"}\n");
            }
        }
    }
    assert_eq!(exchange(&path, b"{\"command\":\"status\"}\n"), "{\"state\":\"waiting\"}\n");
}

#[test]
fn a_further_client_replaces_the_one_that_was_silent_for_longest() {
    let (_directory, path, _server) = started();
    let mut silent: Vec<_> = (0..=MAX_CLIENTS).map(|_| UnixStream::connect(&path).unwrap()).collect();
    // The last client replaced the first one.
    let mut end = [0];
    assert_eq!(silent[0].read(&mut end).unwrap(), 0);
    assert_eq!(exchange(&path, b"{\"command\":\"status\"}\n"), "{\"state\":\"waiting\"}\n");
    assert_eq!(silent[1].read(&mut end).unwrap(), 0);
}

/// Starts a server that does not answer `pause`, but passes its [`Reply`] to the returned receiver.
fn started_with_slow_pause(directory: &tempfile::TempDir) -> (PathBuf, ControlServer, Receiver<Reply>) {
    let path = directory.path().join("control");
    let (pauses, pending) = channel();
    let answer = move |request| match request {
        Request::Pause => {
            let (reply, outcome) = Reply::channel();
            pauses.send(reply).unwrap();
            outcome.recv().unwrap_or_else(|_| Err(refusal("unanswered".to_owned())))
        }
        other => handler(other),
    };
    let server = ControlServer::start(BoundSocket::bind(&path).unwrap(), answer).unwrap();
    (path, server, pending)
}

#[test]
fn a_slow_request_does_not_delay_other_clients() {
    let directory = tempfile::tempdir().unwrap();
    let (path, server, pending) = started_with_slow_pause(&directory);
    let mut patient = BufReader::new(UnixStream::connect(&path).unwrap());
    patient.get_mut().write_all(b"{\"command\":\"pause\"}\n{\"command\":\"status\"}\n").unwrap();
    let reply = pending.recv().unwrap();
    // A client that waits for a reply is not replaced by another one.
    let others: Vec<_> = (0..MAX_CLIENTS).map(|_| ControlClient::connect(&path).unwrap()).collect();
    for mut other in others.into_iter().rev().take(MAX_CLIENTS - 1) {
        other.call(&Request::Status).unwrap();
    }
    reply.send(Ok(json!({"done": true})));
    let mut lines = [String::new(), String::new()];
    for line in &mut lines {
        patient.read_line(line).unwrap();
    }
    assert_eq!(lines, ["{\"done\":true}\n", "{\"state\":\"waiting\"}\n"]);

    // Dropping the reply refuses the request.
    patient.get_mut().write_all(b"{\"command\":\"pause\"}\n{\"command\":\"pause\"}\n").unwrap();
    drop(pending.recv().unwrap());
    let mut line = String::new();
    patient.read_line(&mut line).unwrap();
    assert_eq!(line, "{\"error\":\"unanswered\"}\n");
    // A reply that is sent just before the server stops reaches its client.
    pending.recv().unwrap().send(Ok(json!({"last": true})));
    server.stop();
    line.clear();
    patient.read_line(&mut line).unwrap();
    assert_eq!(line, "{\"last\":true}\n");
}

#[test]
fn a_further_client_waits_while_all_others_wait_for_replies() {
    let directory = tempfile::tempdir().unwrap();
    let (path, server, pending) = started_with_slow_pause(&directory);
    let pause = || {
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"{\"command\":\"pause\"}\n").unwrap();
        (client, pending.recv().unwrap())
    };
    let (clients, mut replies): (Vec<_>, Vec<_>) = (0..MAX_CLIENTS).map(|_| pause()).unzip();
    let next = std::thread::spawn({
        let path = path.clone();
        move || exchange(&path, b"{\"command\":\"status\"}\n")
    });
    sleep(Duration::from_millis(50));
    assert!(!next.is_finished());
    replies.remove(0).send(Ok(json!({})));
    assert_eq!(next.join().unwrap(), "{\"state\":\"waiting\"}\n");
    drop(replies);
    server.stop();
    for mut client in clients {
        let mut reply = String::new();
        client.read_to_string(&mut reply).unwrap();
        assert!(reply.ends_with("}\n"), "{reply:?}");
    }
}

#[test]
fn a_refusal_reaches_the_client() {
    let (_directory, path, _server) = started();
    let error = ControlClient::connect(&path).unwrap().call(&Request::Resume).unwrap_err();
    assert!(
        matches!(&error, ClientError::Refused(why) if why == "Resume is not for this process"),
        "{error}"
    );
}

#[test]
fn stopping_flushes_replies_and_removes_the_socket() {
    let (_directory, path, server) = started();
    let mut stream = UnixStream::connect(&path).unwrap();
    // More replies than the socket's buffers hold, so the server blocks in the middle of one.
    stream.write_all(&b"{\"command\":\"stats\"}\n".repeat(100)).unwrap();
    sleep(Duration::from_millis(50));
    let mut reader = BufReader::new(stream);
    let mut reply = String::new();
    reader.read_line(&mut reply).unwrap();
    let stopper = std::thread::spawn(move || server.stop());
    let mut rest = String::new();
    reader.read_to_string(&mut rest).unwrap();
    stopper.join().unwrap();
    assert!(rest.is_empty() || rest.ends_with('\n'), "a reply is truncated");
    assert!(!path.exists());
}
