//! Sends and receives frames: the driver copies them to and from the buffers of its rings.

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use super::device::{Device, PATIENCE};
use super::memory::GuestMemory;
use super::net::{NetHeader, features};
use super::queue::Used;
use super::ring::{Ring, Slot};

/// Fills receive buffers, to detect writes after the end of a frame.
const CANARY: u8 = 0xa5;

impl Device {
    /// Makes all receive buffers available and kicks.
    ///
    /// # Errors
    /// Returns an error if a queue has no descriptors for its buffers, or a kick fails.
    pub fn fill_receive_rings(&mut self) -> Result<()> {
        for pair in 0..self.pairs.len() {
            self.post_receive_buffers(pair, usize::MAX)?;
            self.pairs[pair].receive.kick()?;
        }
        Ok(())
    }

    /// The guest address and length of each piece of each receive buffer.
    pub fn receive_buffers(&self) -> impl Iterator<Item = (u64, usize)> {
        let slots = self.pairs.iter().flat_map(|pair| &pair.receive.slots);
        slots.flat_map(|slot| &slot.pieces).map(|(buffer, slice)| (buffer.address, slice.len()))
    }

    /// The guest address and length of each used ring, including the event index.
    pub fn used_rings(&self) -> impl Iterator<Item = (u64, usize)> {
        let rings = self.pairs.iter().flat_map(|pair| [&pair.receive.queue, &pair.transmit.queue]);
        rings.map(|queue| (queue.addresses().used, queue.raw()[2].len()))
    }

    /// Makes up to `count` free receive buffers available and publishes them without a kick. Returns their number.
    ///
    /// # Errors
    /// Returns an error if the queue has no descriptors for a buffer.
    pub fn post_receive_buffers(&mut self, pair: usize, count: usize) -> Result<usize> {
        let ring = &mut self.pairs[pair].receive;
        let mut posted = 0;
        while posted < count
            && let Some(slot) = ring.free.pop()
        {
            post(ring, &self.memory, slot, self.options.canaries)?;
            posted += 1;
        }
        ring.queue.publish();
        Ok(posted)
    }

    /// The length of the header before each frame.
    pub fn header_length(&self) -> usize {
        NetHeader::length(self.options.features)
    }

    /// Adds a frame to a transmit queue without publishing it. Returns false if the queue is full.
    ///
    /// # Errors
    /// Returns an error if the frame is larger than a buffer.
    pub fn enqueue(&mut self, pair: usize, header: &NetHeader, frame: &[u8]) -> Result<bool> {
        let header_length = self.header_length();
        let ring = &mut self.pairs[pair].transmit;
        while let Some(used) = ring.queue.pop() {
            ring.free.push(ring.slot_of_head[usize::from(used.head)]);
        }
        let Some(slot) = ring.free.pop() else { return Ok(false) };
        let header = header.encode();
        let parts = [&header[..header_length], frame];
        let length = header_length + frame.len();
        ensure!(
            length <= ring.slots[usize::from(slot)].capacity,
            "a frame of {} bytes does not fit a buffer",
            frame.len()
        );
        scatter(&ring.slots[usize::from(slot)], parts);
        ring.add(&self.memory, slot, length).context("the queue has no descriptor for its buffer")?;
        Ok(true)
    }

    /// Publishes the frames added to a transmit queue, and kicks if the device wants it.
    ///
    /// # Errors
    /// Returns an error if the kick fails.
    pub fn flush(&mut self, pair: usize) -> Result<()> {
        self.pairs[pair].transmit.publish()
    }

    /// Sends a frame. Waits for room if the queue is full.
    ///
    /// # Errors
    /// Returns an error if the queue stays full for [`PATIENCE`], or the frame is larger than a buffer.
    pub fn send(&mut self, pair: usize, header: &NetHeader, frame: &[u8]) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.enqueue(pair, header, frame)? {
            ensure!(self.pairs[pair].transmit.wait_used(deadline)?, "the transmit queue remains full");
        }
        self.flush(pair)
    }

    /// Waits until the device has used every chain of a transmit queue.
    ///
    /// # Errors
    /// Returns an error if the device does not use all of them within [`PATIENCE`].
    pub fn wait_transmitted(&mut self, pair: usize) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let ring = &mut self.pairs[pair].transmit;
        loop {
            while let Some(used) = ring.queue.pop() {
                ring.free.push(ring.slot_of_head[usize::from(used.head)]);
            }
            if ring.queue.outstanding() == 0 {
                return Ok(());
            }
            ensure!(
                ring.wait_used(deadline)?,
                "the device did not use {} transmit chains of pair {pair}",
                ring.queue.outstanding()
            );
        }
    }

    /// Takes a received frame, if there is one, into `frame`, whose contents it replaces. Makes the buffers of the
    /// frame available again at once.
    ///
    /// # Errors
    /// Returns an error if the device violates the specification: an impossible length, an incomplete frame, or bytes
    /// written after the frame.
    pub fn try_receive(&mut self, pair: usize, frame: &mut Vec<u8>) -> Result<Option<NetHeader>> {
        let header_length = self.header_length();
        let ring = &mut self.pairs[pair].receive;
        frame.clear();
        let Some(used) = ring.queue.pop() else { return Ok(None) };
        let slot = gather(ring, used, frame, self.options.canaries)?;
        ensure!(frame.len() >= header_length, "received {} bytes, less than a header", frame.len());
        let header = NetHeader::decode(&frame[..header_length]);
        post(ring, &self.memory, slot, self.options.canaries)?;
        // Without mergeable buffers a driver ignores the number, which vhost-net of older kernels does not set.
        let mergeable = self.options.features & features::MRG_RXBUF != 0;
        let buffers = if mergeable { header.num_buffers } else { 1 };
        ensure!(buffers >= 1, "the header says that the frame is in no buffers");
        for number in 1..buffers {
            let used = ring.queue.pop();
            let Some(used) = used else { bail!("buffer {number} of the {buffers} of a frame is missing") };
            let slot = gather(ring, used, frame, self.options.canaries)?;
            post(ring, &self.memory, slot, self.options.canaries)?;
        }
        frame.drain(..header_length);
        ring.publish()?;
        Ok(Some(header))
    }

    /// Waits for a frame.
    ///
    /// # Errors
    /// Returns the errors of [`Self::try_receive`], and an error if no frame arrives before `deadline`.
    pub fn receive_until(
        &mut self,
        pair: usize,
        frame: &mut Vec<u8>,
        deadline: Instant,
    ) -> Result<NetHeader> {
        loop {
            if let Some(header) = self.try_receive(pair, frame)? {
                return Ok(header);
            }
            ensure!(self.pairs[pair].receive.wait_used(deadline)?, "no frame arrived on pair {pair}");
        }
    }

    /// Waits up to [`PATIENCE`] for a frame.
    ///
    /// # Errors
    /// Returns the errors of [`Self::receive_until`].
    pub fn receive(&mut self, pair: usize) -> Result<(NetHeader, Vec<u8>)> {
        let mut frame = Vec::new();
        let header = self.receive_until(pair, &mut frame, Instant::now() + PATIENCE)?;
        Ok((header, frame))
    }
}

/// Copies a header and a frame into the pieces of a slot.
fn scatter(slot: &Slot, parts: [&[u8]; 2]) {
    let mut pieces = slot.pieces.iter();
    let mut target = pieces.next();
    let mut offset = 0;
    for mut part in parts {
        while let Some((_, slice)) = target
            && !part.is_empty()
        {
            let count = part.len().min(slice.len() - offset);
            slice.write(offset, &part[..count]);
            part = &part[count..];
            offset += count;
            if offset == slice.len() {
                target = pieces.next();
                offset = 0;
            }
        }
    }
}

/// Makes a receive slot available, without publishing it.
fn post(ring: &mut Ring, memory: &GuestMemory, slot: u16, canaries: bool) -> Result<()> {
    if canaries {
        for (_, slice) in &ring.slots[usize::from(slot)].pieces {
            slice.fill(CANARY);
        }
    }
    let capacity = ring.slots[usize::from(slot)].capacity;
    ring.add(memory, slot, capacity).context("the queue has no descriptor for its buffer")?;
    Ok(())
}

/// Appends the bytes that the device wrote to a receive buffer to `frame`. Returns the slot of the buffer.
fn gather(ring: &Ring, used: Used, frame: &mut Vec<u8>, canaries: bool) -> Result<u16> {
    let number = ring.slot_of_head[usize::from(used.head)];
    let slot = &ring.slots[usize::from(number)];
    let mut left = used.length as usize;
    ensure!(left <= slot.capacity, "the device reported {left} bytes in a buffer of {}", slot.capacity);
    for (_, slice) in &slot.pieces {
        let count = left.min(slice.len());
        slice.append_to(0, count, frame);
        left -= count;
        if canaries && count < slice.len() {
            let start = frame.len();
            slice.append_to(count, slice.len() - count, frame);
            let untouched = frame[start..].iter().all(|&byte| byte == CANARY);
            frame.truncate(start);
            ensure!(untouched, "the device wrote beyond the {} bytes that it reported", used.length);
        }
    }
    Ok(number)
}
