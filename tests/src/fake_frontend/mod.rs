//! A vhost-user front-end and virtio-net driver for tests, under complete control of what it sends and when.
//!
//! It shares no code with the back-end, so that neither's mistakes hide the other's: [`wire`] encodes messages, also
//! wrong ones; [`connection`] speaks them; [`memory`] is the guest's memory; [`dirty_log`] is where the back-end notes
//! what it wrote, [`inflight`] which chains it has; [`queue`] is the driver's side of a split virtqueue, [`ring`] a queue
//! with its buffers and eventfds; [`net`] has the device's feature bits and frame header; [`device`] and its [`frame_io`]
//! put it all together for tests that just want a working device.
//!
//! The data path does not allocate: it also serves as a load generator.

pub mod connection;
pub mod device;
pub mod dirty_log;
pub mod frame_io;
pub mod inflight;
pub mod memory;
pub mod net;
pub mod queue;
pub mod ring;
pub mod wire;

pub use connection::Connection;
pub use device::{Device, Options};
pub use dirty_log::DirtyLog;
pub use inflight::Inflight;
pub use memory::{GuestMemory, Region, SharedSlice};
pub use net::{NetHeader, features};
pub use queue::{Buffer, DriverQueue, RingAddresses};
