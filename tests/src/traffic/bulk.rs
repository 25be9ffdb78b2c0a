//! Much data over TCP: the sender says afterwards what the sum was, the receiver compares.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{Connection, Direction, Request};

/// How much is written or read at once.
const CHUNK: usize = 1 << 17;

/// What one end has counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Sum {
    bytes: u64,
    crc: u32,
}

/// What a transfer came to, once both ends' sums have been found equal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Over all streams.
    pub bytes: u64,
    /// The CRC-32 of each stream, in hexadecimal.
    pub sums: Vec<String>,
    /// How long the slowest stream took.
    pub seconds: f64,
}

/// Moves `bytes` over each of `streams` TCP connections at once.
pub fn check(server: SocketAddr, direction: Direction, bytes: u64, streams: u16) -> Result<Outcome> {
    let start = Instant::now();
    let threads: Vec<_> = (1..=u64::from(streams))
        .map(|seed| thread::spawn(move || stream(server, direction, bytes, seed)))
        .collect();
    let mut outcome = Outcome { bytes: 0, sums: Vec::new(), seconds: 0.0 };
    for thread in threads {
        let Ok(sum) = thread.join() else { bail!("a stream's thread panicked") };
        let sum = sum?;
        outcome.bytes += sum.bytes;
        outcome.sums.push(format!("{:08x}", sum.crc));
    }
    outcome.seconds = start.elapsed().as_secs_f64();
    Ok(outcome)
}

fn stream(server: SocketAddr, direction: Direction, bytes: u64, seed: u64) -> Result<Sum> {
    let mut connection = Connection::open(server, &Request::Bulk { direction, bytes, seed })?;
    let (sent, received) = match direction {
        Direction::Up => (write(&mut connection, bytes, seed)?, connection.hear()?),
        Direction::Down => {
            let received = read(&mut connection, bytes)?;
            (connection.hear()?, received)
        }
    };
    if sent != received {
        bail!("sent {sent:?}, received {received:?}");
    }
    Ok(sent)
}

/// The server's part when it receives.
pub(super) fn receive(connection: &mut Connection, bytes: u64) -> Result<()> {
    let sum = read(connection, bytes)?;
    connection.say(&sum)
}

/// The server's part when it sends.
pub(super) fn send(connection: &mut Connection, bytes: u64, seed: u64) -> Result<()> {
    let sum = write(connection, bytes, seed)?;
    connection.say(&sum)
}

fn write(connection: &mut Connection, bytes: u64, seed: u64) -> Result<Sum> {
    let mut noise = Noise::new(seed);
    let mut chunk = vec![0; CHUNK];
    let mut crc = crc32fast::Hasher::new();
    let mut left = bytes;
    while left > 0 {
        let length = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        noise.fill(&mut chunk[..length]);
        crc.update(&chunk[..length]);
        connection.stream.get_mut().write_all(&chunk[..length]).context("cannot send")?;
        left -= length as u64;
    }
    Ok(Sum { bytes, crc: crc.finalize() })
}

fn read(connection: &mut Connection, bytes: u64) -> Result<Sum> {
    let mut chunk = vec![0; CHUNK];
    let mut crc = crc32fast::Hasher::new();
    let mut left = bytes;
    while left > 0 {
        let room = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let length = connection.stream.read(&mut chunk[..room]).context("cannot receive")?;
        if length == 0 {
            bail!("the stream ended {left} bytes early");
        }
        crc.update(&chunk[..length]);
        left -= length as u64;
    }
    Ok(Sum { bytes, crc: crc.finalize() })
}

/// Bytes without a pattern, the same for the same seed (xorshift64*).
pub(super) struct Noise(u64);

impl Noise {
    pub(super) fn new(seed: u64) -> Self {
        // The generator must not start at 0.
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
