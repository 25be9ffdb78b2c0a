//! A vhost-user front-end and virtio-net driver for tests, which control everything that it sends, and when.
//!
//! It shares no code with the back-end, so a mistake in one cannot hide a mistake in the other. [`wire`] encodes
//! messages, valid or not, and [`connection`] exchanges them. [`memory`] is the guest's memory, [`dirty_log`] the log
//! of pages that the back-end writes, [`inflight`] the region that tracks its chains. [`queue`] is the driver's side of
//! a split virtqueue, and [`ring`] a queue with its buffers and eventfds. [`net`] has the feature bits and the frame
//! header. [`device`] and its [`frame_io`] combine all of them for tests that need a working device.
//!
//! Sending and receiving frames does not allocate memory: the front-end also serves as a load generator.

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
