//! Device state that a front-end moves (`SET_DEVICE_STATE_FD`, `CHECK_DEVICE_STATE`): with the TAP over a Unix packet
//! socket, without the TAP over a pipe or a stream. The back-end whose ring starts first takes the device.
#![expect(clippy::unwrap_used, reason = "these are tests")]

mod owners;
mod refusal;
mod transfer;
mod trust;

use std::fs::File;
use std::io::{Read, Write};

use anyhow::{Result, ensure};
use baton_tests::device_state::{ACCEPTED, check, set_state_fd};
use baton_tests::fake_frontend::{Connection, Device};

/// Saves the device state over a channel.
fn save(device: &Device, channel: &impl Fn() -> Result<(File, File)>) -> Result<Vec<u8>> {
    let (mut read, write) = channel()?;
    ensure!(set_state_fd(&device.connection, true, &write)? == ACCEPTED);
    drop(write);
    let mut state = Vec::new();
    read.read_to_end(&mut state)?;
    ensure!(check(&device.connection)?);
    Ok(state)
}

/// Loads device state over a channel.
fn load(connection: &Connection, state: &[u8], channel: &impl Fn() -> Result<(File, File)>) -> Result<()> {
    let (read, mut write) = channel()?;
    ensure!(set_state_fd(connection, false, &read)? == ACCEPTED);
    write.write_all(state)?;
    drop((read, write));
    ensure!(check(connection)?, "the state was not loaded");
    Ok(())
}
