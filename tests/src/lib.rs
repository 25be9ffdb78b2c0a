//! What the process-level tests share.
//!
//! The [`programs`] under test run as [`process`]es, a [`backend`] among them, in a [`netns`] of the test's own, with a
//! [`packet_socket`] on the TAP for [`frames`], and a [`fake_frontend`] or a [`guest`] (booted from [`images`],
//! making [`traffic`]) on the other side; a [`link`] is all of that with checks. Most tests are run with either
//! [`datapath`]. In [`local_migration`] a guest moves from one baton-vmm to the next, or
//! fails to at a [`fake_target`]; the [`fault_matrix`] has its processes and those of a session's hand-over die, hang and
//! run out of descriptors, and a [`downscript`] is run once. A front-end moves [`device_state`], and other
//! [`users`] try what is not theirs. A [`mod@bench`] measures. A [`reference_backend`] stands in for `baton-backend`
//! without its code. The [`lab`] runs a test in a machine that has what this one lacks.

pub mod backend;
pub mod bench;
pub mod datapath;
pub mod device_state;
pub mod downscript;
pub mod fake_frontend;
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
