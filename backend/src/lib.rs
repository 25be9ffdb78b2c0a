//! Baton's back-end: a vhost-user virtio-net device whose dataplane and TAP live in this process.
//!
//! [`server`] runs the event loop. [`endpoint`] provides front-ends, [`session`] reads their messages, and [`dispatch`]
//! applies each message to the [`device`], whose [`dataplane`] moves frames between guest [`memory`] and the [`tap`].

pub mod args;

pub mod config_space;
pub mod control;
pub mod dataplane;
pub mod device;
pub mod dirty_log;
pub mod dispatch;
pub mod endpoint;
pub mod event_channel;
pub mod events;
pub mod features;
pub mod handover;
pub mod inflight;
pub mod inherited;

pub mod memory;
pub mod metrics;
pub mod net_header;
pub mod notify;
pub mod script;
pub mod server;
pub mod session;
pub mod shared;
pub mod shared_mapping;
pub mod sigbus;
pub mod tap;
pub mod vhost_net;
pub mod vring;
pub mod vring_setup;
pub mod yielding;
