//! Shared code of the process-level tests, the benchmarks and the demo.
//!
//! The [`programs`] under test, such as a [`backend`], run as [`process`]es in a [`netns`] that belongs to the test.
//! On one side, a [`packet_socket`] on the TAP sends and receives [`frames`]. On the other side is a [`fake_frontend`]
//! or a [`guest`], which boots from [`images`] and generates [`traffic`]. A [`link`] combines all of these with checks.
//! Most tests run with both [`datapath`]s.
//!
//! In [`local_migration`], a guest migrates from one baton-vmm to another, or fails to at a [`fake_target`]. A
//! [`fake_source`] sends a baton-vmm anything. The
//! [`fault_matrix`] makes the processes of migrations and hand-overs die, hang and run out of descriptors. A
//! [`downscript`] records its runs. A front-end moves [`device_state`], and other [`users`] attempt forbidden requests.
//! A [`mod@bench`] measures hand-overs. A [`reference_backend`] replaces `baton-backend` without sharing its code. The
//! [`lab`] runs a test in a machine that has what this one lacks.

pub mod backend;
pub mod bench;
pub mod datapath;
pub mod device_state;
pub mod downscript;
pub mod fake_frontend;
pub mod fake_source;
pub mod fake_target;
pub mod fault_matrix;
pub mod faults;
pub mod frames;
pub mod guest;
pub mod hostile;
pub mod images;
pub mod jitter;
pub mod lab;
pub mod link;
pub mod load;
pub mod local_migration;
pub mod macvtap;
pub mod migration;
pub mod netns;
pub mod numbered_frames;
pub mod packet_socket;
pub mod paths;
pub mod ping;
pub mod process;
pub mod programs;
pub mod qmp;
pub mod reference_backend;
pub mod session_peer;
pub mod switching;
pub mod traffic;
pub mod users;
