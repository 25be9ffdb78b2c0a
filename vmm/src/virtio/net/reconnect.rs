//! Looks for a back-end that is to take a lost one's place.
//!
//! A thread of its own, because a handshake can take long: a back-end that is busy or stuck must not keep the
//! device's thread from its driver. It ends with the first back-end that it finds, usable or not.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::shared::NetShared;
use crate::event;
use crate::vhost_user::frontend::{Cutter, Link, LinkError, connect_to};

/// How often a back-end is looked for. Nothing announces a Unix socket that listens again.
const INTERVAL: Duration = Duration::from_millis(100);

/// Connects to the device's back-end, which must be there, and greets it.
pub fn dial(shared: &NetShared) -> Result<Link, LinkError> {
    greet(shared, connect(shared)?)
}

/// Connects, in a way that other threads can cut.
fn connect(shared: &NetShared) -> Result<UnixStream, LinkError> {
    let stream = connect_to(shared.socket())?;
    shared.set_cutter(Some(Cutter::new(&stream)?));
    Ok(stream)
}

fn greet(shared: &NetShared, stream: UnixStream) -> Result<Link, LinkError> {
    Link::establish(stream, shared.queue_pairs() * 2)
}

/// A search that is under way.
#[derive(Debug)]
pub struct Dialler {
    found: Receiver<Result<Link, LinkError>>,
    /// Closed to end the search.
    go_on: Option<Sender<()>>,
    shared: Arc<NetShared>,
    thread: Option<JoinHandle<()>>,
}

impl Dialler {
    /// Starts the search; `wake` is signalled when it has ended.
    pub fn start(shared: Arc<NetShared>, wake: Arc<EventFd>) -> std::io::Result<Self> {
        let (go_on, ended) = channel();
        let (sender, found) = channel();
        let search = Search { shared: Arc::clone(&shared), ended };
        let thread = Builder::new().name("dialler".to_owned()).spawn(move || {
            if let Some(outcome) = search.run() {
                // Nobody takes it: the device has ended.
                let _ = sender.send(outcome);
            }
            event::signal(&wake);
        })?;
        Ok(Self { found, go_on: Some(go_on), shared, thread: Some(thread) })
    }

    /// What was found, once something was: the search has ended then.
    pub fn found(&mut self) -> Option<Result<Link, LinkError>> {
        let outcome = self.found.try_recv().ok()?;
        self.join();
        Some(outcome)
    }

    fn join(&mut self) {
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the search for a back-end panicked");
        }
    }
}

impl Drop for Dialler {
    fn drop(&mut self) {
        if self.thread.is_none() {
            return;
        }
        // A handshake that has begun is cut, and none begins any more: the search looks at `go_on` in between.
        self.go_on = None;
        self.shared.cut();
        self.join();
    }
}

struct Search {
    shared: Arc<NetShared>,
    ended: Receiver<()>,
}

impl Search {
    fn run(&self) -> Option<Result<Link, LinkError>> {
        while self.ended.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
            let stream = match connect(&self.shared) {
                Ok(stream) => stream,
                // Nobody listens: that is what is being waited for.
                Err(LinkError::Connect(_)) => continue,
                Err(error) => return Some(Err(error)),
            };
            if self.ended.try_recv() != Err(TryRecvError::Disconnected) {
                return Some(greet(&self.shared, stream));
            }
        }
        None
    }
}
