//! Tests of `batonctl` on its command line.
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::path::Path;
use std::process::{Command, Output};

use baton_channel::bound_socket::BoundSocket;
use baton_control::ControlServer;
use baton_protocol::control::{Done, Refusal, Request};
use serde_json::json;

fn served(directory: &Path) -> ControlServer {
    let socket = BoundSocket::bind(&directory.join("control")).unwrap();
    ControlServer::start(socket, |request| match request {
        Request::Status => Ok(json!({"state": "waiting", "vrings": [{"size": 256, "started": true}]})),
        // Returns the request, for the tests to inspect.
        Request::Handover { .. } => Ok(serde_json::to_value(request).unwrap()),
        Request::Quit => Ok(serde_json::to_value(Done::DONE).unwrap()),
        _ => Err(Refusal { error: "a back-end cannot do this".to_owned() }),
    })
    .unwrap()
}

fn batonctl(directory: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_batonctl")).current_dir(directory).args(arguments).output().unwrap()
}

#[track_caller]
fn assert_output(output: &Output, code: i32, stdout: &str, stderr: &str) {
    assert_eq!(String::from_utf8_lossy(&output.stdout), stdout);
    assert_eq!(String::from_utf8_lossy(&output.stderr), stderr);
    assert_eq!(output.status.code(), Some(code));
}

#[test]
fn a_reply_is_printed_for_people_or_as_json() {
    let directory = tempfile::tempdir().unwrap();
    let _server = served(directory.path());
    let listed = "state:  waiting\n\nvrings:\n   size  started\n0   256      yes\n";
    assert_output(&batonctl(directory.path(), &["control", "status"]), 0, listed, "");
    let json = "{\"state\":\"waiting\",\"vrings\":[{\"size\":256,\"started\":true}]}\n";
    assert_output(&batonctl(directory.path(), &["--json", "control", "status"]), 0, json, "");
    let done = "{\"result\":\"done\"}\n";
    assert_output(&batonctl(directory.path(), &["--json", "control", "quit"]), 0, done, "");
}

#[test]
fn a_hand_over_request_has_an_absolute_path() {
    let directory = tempfile::tempdir().unwrap();
    let _server = served(directory.path());
    let place = directory.path().canonicalize().unwrap().join("next");
    let asked = |rest: &str| format!("{{\"command\":\"handover\"{rest}}}\n");
    let path = format!(",\"path\":\"{}\"", place.display());
    for (arguments, rest) in [
        (&["next", "--on-suspend"] as &[&str], format!("{path},\"on-suspend\":true")),
        (&["next", "--dry-run"], format!("{path},\"dry-run\":true")),
        (&["--cancel"], ",\"cancel\":true".to_owned()),
    ] {
        let arguments = [&["--json", "control", "handover"], arguments].concat();
        assert_output(&batonctl(directory.path(), &arguments), 0, &asked(&rest), "");
    }
}

#[test]
fn a_refusal_is_reported_in_one_line_with_exit_code_1() {
    let directory = tempfile::tempdir().unwrap();
    let _server = served(directory.path());
    let output = batonctl(directory.path(), &["control", "pause"]);
    assert_output(&output, 1, "", "batonctl: a back-end cannot do this\n");
}

#[test]
fn a_failed_connection_is_reported_in_one_line_with_exit_code_1() {
    let directory = tempfile::tempdir().unwrap();
    let output = batonctl(directory.path(), &["control", "status"]);
    let line = "batonctl: cannot connect to control (is a process running with this --control-socket?): \
                No such file or directory (os error 2)\n";
    assert_output(&output, 1, "", line);
}

#[test]
fn an_invalid_command_line_has_exit_code_2() {
    let directory = tempfile::tempdir().unwrap();
    for arguments in
        [&["control"] as &[&str], &["control", "dance"], &["status"], &[], &["control", "handover"]]
    {
        let output = batonctl(directory.path(), arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(output.stdout.is_empty());
    }
}
