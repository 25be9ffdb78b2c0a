//! Bulk data over TCP. Both ends compute a checksum, which they compare afterwards.
//!
//! The data is sent in chunks, each preceded by its length, so the sender can stop at any time. A length of 0 marks the
//! end.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{Connection, Direction, Request, Stop};

/// The maximum length of a chunk: enough for the largest frames.
const CHUNK: usize = 1 << 17;

/// The length of a chunk of an endless stream, which can be slowed down or stopped after each chunk.
const PACED_CHUNK: usize = 1 << 14;

/// The size of the length before each chunk, in network byte order.
const HEADER: usize = size_of::<u32>();

/// The length of an endless stream: more than any stream carries.
const ENDLESS: u64 = u64::MAX;

/// The length and checksum at one end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Sum {
    bytes: u64,
    crc: u32,
}

/// The result of a transfer whose checksums are equal at both ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Bytes over all streams.
    pub bytes: u64,
    /// The CRC-32 of each stream, in hexadecimal.
    pub sums: Vec<String>,
    /// How long the slowest stream took.
    pub seconds: f64,
}

/// Transfers `bytes` over each of `streams` TCP connections in parallel.
pub fn check(server: SocketAddr, direction: Direction, bytes: u64, streams: u16) -> Result<Outcome> {
    let start = Instant::now();
    let threads: Vec<_> = (1..=u64::from(streams))
        .map(|seed| thread::spawn(move || stream(server, direction, bytes, seed, |_| true)))
        .collect();
    let mut outcome = Outcome { bytes: 0, sums: Vec::new(), seconds: 0.0 };
    for thread in threads {
        let Ok(sum) = thread.join() else { bail!("the thread of a stream panicked") };
        let sum = sum?;
        outcome.bytes += sum.bytes;
        outcome.sums.push(format!("{:08x}", sum.crc));
    }
    outcome.seconds = start.elapsed().as_secs_f64();
    Ok(outcome)
}

/// Transfers data over a connection until `go_on`, which gets the number of bytes after each chunk, returns false.
/// Returns the number of bytes.
pub(super) fn check_until(
    server: SocketAddr,
    direction: Direction,
    seed: u64,
    go_on: impl FnMut(u64) -> bool,
) -> Result<u64> {
    Ok(stream(server, direction, ENDLESS, seed, go_on)?.bytes)
}

fn stream(
    server: SocketAddr,
    direction: Direction,
    bytes: u64,
    seed: u64,
    mut go_on: impl FnMut(u64) -> bool,
) -> Result<Sum> {
    let mut connection = Connection::open(server, &Request::Bulk { direction, bytes, seed })?;
    let (sent, received) = match direction {
        Direction::Up => {
            (write(&mut connection, bytes, seed, |_, sent| Ok(go_on(sent)))?, connection.hear()?)
        }
        Direction::Down => {
            let mut stopped = false;
            let received = read(&mut connection, |connection, received| {
                if !stopped && !go_on(received) {
                    stopped = true;
                    connection.say(&Stop)?;
                }
                Ok(())
            })?;
            (connection.hear()?, received)
        }
    };
    if sent != received {
        bail!("sent {sent:?}, but received {received:?}");
    }
    Ok(sent)
}

/// Serves a client that sends.
pub(super) fn serve_receive(connection: &mut Connection) -> Result<()> {
    let sum = read(connection, |_, _| Ok(()))?;
    connection.say(&sum)
}

/// Serves a client that receives.
pub(super) fn serve_send(connection: &mut Connection, bytes: u64, seed: u64) -> Result<()> {
    let sum =
        write(connection, bytes, seed, |connection, _| Ok(connection.hear_if_said::<Stop>()?.is_none()))?;
    connection.say(&sum)
}

fn write(
    connection: &mut Connection,
    bytes: u64,
    seed: u64,
    mut go_on: impl FnMut(&mut Connection, u64) -> Result<bool>,
) -> Result<Sum> {
    let mut noise = Noise::new(seed);
    let most = if bytes == ENDLESS { PACED_CHUNK } else { CHUNK };
    let mut chunk = vec![0; HEADER + most];
    let mut crc = crc32fast::Hasher::new();
    let mut sent = 0;
    while sent < bytes && go_on(connection, sent)? {
        let length = usize::try_from(bytes - sent).unwrap_or(most).min(most);
        let (header, data) = chunk.split_at_mut(HEADER);
        header.copy_from_slice(&u32::try_from(length)?.to_be_bytes());
        noise.fill(&mut data[..length]);
        crc.update(&data[..length]);
        connection.stream.get_mut().write_all(&chunk[..HEADER + length]).context("cannot send")?;
        sent += length as u64;
    }
    connection.stream.get_mut().write_all(&[0; HEADER]).context("cannot send")?;
    Ok(Sum { bytes: sent, crc: crc.finalize() })
}

fn read(
    connection: &mut Connection,
    mut look: impl FnMut(&mut Connection, u64) -> Result<()>,
) -> Result<Sum> {
    let mut chunk = vec![0; CHUNK];
    let mut crc = crc32fast::Hasher::new();
    let mut received = 0;
    loop {
        let mut header = [0; HEADER];
        let fail = || format!("cannot receive after {received} bytes");
        connection.stream.read_exact(&mut header).with_context(fail)?;
        let length = usize::try_from(u32::from_be_bytes(header))?;
        if length == 0 {
            return Ok(Sum { bytes: received, crc: crc.finalize() });
        }
        let Some(data) = chunk.get_mut(..length) else { bail!("a chunk of {length} bytes is too long") };
        connection.stream.read_exact(data).with_context(fail)?;
        crc.update(data);
        received += length as u64;
        look(connection, received)?;
    }
}

/// A generator of pseudo-random bytes (xorshift64*).
pub(super) struct Noise(u64);

impl Noise {
    pub(super) fn new(seed: u64) -> Self {
        // The state must not be 0.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_mut(8) {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            let value = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
            word.copy_from_slice(&value[..word.len()]);
        }
    }
}
