//! A network device's thread: its start and its end.

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use super::device::Net;
use super::error::NetError;
use super::mailbox::{Mailbox, mailbox};
use super::shared::NetShared;
use super::worker::Worker;
use crate::config::NetConfig;
use crate::memory::GuestMemory;

/// A network device's thread.
#[derive(Debug)]
pub struct NetThread {
    /// What the worker shares with the transport.
    pub shared: Arc<NetShared>,
    /// Sends tasks to the worker.
    pub mailbox: Mailbox,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl NetThread {
    /// Starts the thread and waits until it has connected to the back-end. Also returns the device for the transport.
    /// Without `memory` the device is suspended until its guest arrives.
    pub fn start(
        name: String,
        config: &NetConfig,
        memory: Option<GuestMemory>,
    ) -> Result<(Self, Net), NetError> {
        let shared = Arc::new(NetShared::new(config).map_err(NetError::Thread)?);
        let (mailbox, inbox) = mailbox().map_err(NetError::Thread)?;
        let mut worker = Worker::new(name.clone(), config.clone(), Arc::clone(&shared), memory, inbox)
            .map_err(NetError::Thread)?;
        let (sender, connected) = channel();
        let run = move || {
            let outcome = worker.connect();
            let usable = outcome.is_ok();
            if sender.send(outcome).is_ok() && usable {
                worker.run();
            }
        };
        let thread = Builder::new().name(name).spawn(run).map_err(NetError::Thread)?;
        connected.recv().unwrap_or(Err(NetError::Ended))?;
        let net = Net::new(Arc::clone(&shared), mailbox.clone());
        Ok((Self { shared, mailbox, thread: Mutex::new(Some(thread)) }, net))
    }

    /// Ends the thread and with it the connection.
    pub fn stop(&self) {
        self.mailbox.send(Worker::quit);
        self.shared.shut_down_connection();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("a network device's thread panicked");
        }
    }
}

impl Drop for NetThread {
    fn drop(&mut self) {
        self.stop();
    }
}
