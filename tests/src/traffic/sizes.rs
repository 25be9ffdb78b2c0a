//! Datagrams of every size in a range, which the server echoes and the client compares.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::bulk::Noise;
use super::{Connection, PATIENCE, Request};

/// The most datagrams in flight.
const WINDOW: usize = 16;

/// How often the server checks whether the client is still connected.
const TICK: Duration = Duration::from_millis(100);

/// The counters of the client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Datagrams that were sent.
    pub sent: usize,
    /// Datagrams that were echoed unchanged.
    pub intact: usize,
    /// The sizes of the UDP payloads that were not echoed.
    pub lost: Vec<usize>,
    /// Datagrams that were received with unexpected contents.
    pub damaged: usize,
}

impl Outcome {
    /// Returns whether every datagram was echoed unchanged.
    pub fn is_perfect(&self) -> bool {
        self.intact == self.sent && self.damaged == 0
    }
}

/// Sends datagrams with payloads of these sizes, and checks the echoes.
pub fn check(server: SocketAddr, sizes: impl IntoIterator<Item = usize>) -> Result<Outcome> {
    let mut connection = Connection::open(server, &Request::Echo)?;
    let port: u16 = connection.hear()?;
    let socket = connection.datagram_socket()?;
    socket.connect(SocketAddr::new(server.ip(), port))?;
    socket.set_read_timeout(Some(PATIENCE))?;

    let mut outcome = Outcome { sent: 0, intact: 0, lost: Vec::new(), damaged: 0 };
    let mut under_way = BTreeSet::new();
    let mut sizes = sizes.into_iter();
    let mut bytes = vec![0; 65536];
    loop {
        while under_way.len() < WINDOW
            && let Some(size) = sizes.next()
        {
            socket.send(&contents(size)).with_context(|| format!("cannot send {size} bytes"))?;
            under_way.insert(size);
            outcome.sent += 1;
        }
        if under_way.is_empty() {
            return Ok(outcome);
        }
        let length = match socket.recv(&mut bytes) {
            Ok(length) => length,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                outcome.lost.extend(under_way);
                return Ok(outcome);
            }
            Err(error) => return Err(error).context("cannot receive"),
        };
        if under_way.remove(&length) && bytes[..length] == contents(length) {
            outcome.intact += 1;
        } else {
            outcome.damaged += 1;
        }
    }
}

/// Serves a client: echoes every datagram to its sender, until the connection ends.
pub(super) fn serve(connection: &mut Connection) -> Result<()> {
    let socket = connection.datagram_socket()?;
    connection.say(&socket.local_addr()?.port())?;
    connection.stream.get_ref().set_nonblocking(true)?;
    socket.set_read_timeout(Some(TICK))?;
    while is_open(connection)? {
        echo(&socket)?;
    }
    Ok(())
}

fn echo(socket: &UdpSocket) -> Result<()> {
    let mut bytes = vec![0; 65536];
    match socket.recv_from(&mut bytes) {
        Ok((length, from)) => {
            socket.send_to(&bytes[..length], from).context("cannot send the echo")?;
            Ok(())
        }
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(()),
        Err(error) => Err(error).context("cannot receive"),
    }
}

fn is_open(connection: &mut Connection) -> Result<bool> {
    match connection.stream.read(&mut [0]) {
        Ok(0) => Ok(false),
        Ok(_) => bail!("unexpected data from the other end"),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(true),
        Err(error) => Err(error).context("cannot read from the other end"),
    }
}

fn contents(size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    Noise::new(size as u64).fill(&mut bytes);
    bytes
}
