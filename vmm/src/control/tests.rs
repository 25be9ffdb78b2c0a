//! Tests of the control socket while a VM waits for its back-ends. Each test answers in their place.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use baton_control::{ClientError, ControlClient};
use baton_protocol::control::{MigrationReport, NetStatus};
use serde_json::{Value, json};

use super::*;
use crate::config::Config;
use crate::machine::MachineError;
use crate::shutdown::ShutdownHandle;

/// Reached only if a test hangs.
const LIMIT: Duration = Duration::from_secs(60);

type Reply = Result<Value, ClientError>;
/// How a pause or a resume ends.
type Ending = Result<(), MachineError>;
/// The operation that a VM is asked for, and the sender of its outcome.
type Ask = (&'static str, Sender<Ending>);

/// A VM that asks the test how each pause and resume ends.
#[derive(Debug)]
struct Silent {
    asks: Mutex<Sender<Ask>>,
    /// The sender of the outcome that the VM waits for, used by `stop`.
    waiting: Mutex<Option<Sender<Ending>>>,
}

impl Silent {
    fn ask(&self, what: &'static str) -> Result<(), MachineError> {
        let (sender, answer) = channel();
        *self.waiting.lock().unwrap() = Some(sender.clone());
        self.asks.lock().unwrap().send((what, sender)).unwrap();
        answer.recv().unwrap()
    }
}

impl Guest for Silent {
    fn net_status(&self) -> Vec<NetStatus> {
        Vec::new()
    }

    fn start(&self) {}

    fn pause(&self) -> Result<(), MachineError> {
        self.ask("pause")
    }

    fn resume(&self) {
        self.ask("resume").unwrap();
    }

    fn migrate(&self, _request: &MigrationRequest, _started: impl FnOnce(ShutdownHandle)) -> MigrationReport {
        MigrationReport::Possible
    }

    fn stop(&self) {
        if let Some(waiting) = self.waiting.lock().unwrap().take() {
            let _ = waiting.send(Err(MachineError::GuestEnded));
        }
    }
}

/// A running VM and its control socket.
struct Bench {
    path: PathBuf,
    lifecycle: Arc<Lifecycle<Silent>>,
    asks: Receiver<Ask>,
    quit: EventFd,
    _server: ControlServer,
    _directory: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let config = Config::from_arguments(["baton-vmm", "--kernel=k"].map(Into::into)).unwrap();
        let lifecycle = Arc::new(Lifecycle::new(&config));
        let (sender, asks) = channel();
        lifecycle.start(Silent { asks: Mutex::new(sender), waiting: Mutex::default() });
        let quit = event::new().unwrap();
        let handler = ControlHandler { lifecycle: Arc::clone(&lifecycle), quit: quit.try_clone().unwrap() };
        let server = serve(bind(&path).unwrap(), handler).unwrap();
        Self { path, lifecycle, asks, quit, _server: server, _directory: directory }
    }

    fn call(&self, request: &Request) -> Reply {
        ControlClient::connect(&self.path).unwrap().call(request)
    }

    /// Sends `request` on another thread, and waits until the VM carries it out.
    fn begin(&self, request: Request, what: &str) -> (JoinHandle<Reply>, Sender<Ending>) {
        let path = self.path.clone();
        let client = std::thread::spawn(move || ControlClient::connect(&path).unwrap().call(&request));
        let (asked, answer) = self.asks.recv_timeout(LIMIT).unwrap();
        assert_eq!(asked, what);
        (client, answer)
    }

    fn state(&self) -> Value {
        self.call(&Request::Status).unwrap()["state"].take()
    }

    /// Checks that every request that changes the VM is refused, with `reason` in the error.
    fn all_refused(&self, reason: &str) {
        let migrate = Request::Migrate { path: "/nowhere".into(), local: false, dry_run: false };
        for request in [Request::Pause, Request::Resume, migrate] {
            let error = self.call(&request).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}

fn done() -> Value {
    json!({"result": "done"})
}

#[test]
fn other_requests_are_answered_while_pause_and_resume_wait_for_back_end() {
    let bench = Bench::new();
    let (client, back_end) = bench.begin(Request::Pause, "pause");
    assert_eq!(bench.state(), "running");
    bench.all_refused("the VM is being paused");
    back_end.send(Ok(())).unwrap();
    assert_eq!(client.join().unwrap().unwrap(), done());
    assert_eq!(bench.state(), "paused");
    assert_eq!(bench.call(&Request::Pause).unwrap(), done());

    let (client, back_end) = bench.begin(Request::Resume, "resume");
    assert_eq!(bench.state(), "paused");
    bench.all_refused("the VM is being resumed");
    back_end.send(Ok(())).unwrap();
    assert_eq!(client.join().unwrap().unwrap(), done());
    assert_eq!(bench.state(), "running");
    assert_eq!(bench.call(&Request::Resume).unwrap(), done());
}

#[test]
fn vm_keeps_running_after_failed_pause_and_can_be_paused_later() {
    let bench = Bench::new();
    let (client, back_end) = bench.begin(Request::Pause, "pause");
    back_end.send(Err(MachineError::NoDevice(3))).unwrap();
    let error = client.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("there is no network device 3"), "{error}");
    assert_eq!(bench.state(), "running");

    let (client, back_end) = bench.begin(Request::Pause, "pause");
    back_end.send(Ok(())).unwrap();
    assert_eq!(client.join().unwrap().unwrap(), done());
    assert_eq!(bench.state(), "paused");
}

#[test]
fn vmm_ends_while_pause_waits_for_back_end() {
    let bench = Bench::new();
    let (client, _silent) = bench.begin(Request::Pause, "pause");
    assert_eq!(bench.call(&Request::Quit).unwrap(), done());
    bench.quit.read().unwrap();
    // The main thread does the same after `quit`.
    bench.lifecycle.stop();
    client.join().unwrap().unwrap_err();
    bench.all_refused("the VMM is shutting down");
}
