//! Receives descriptors that exceed the limit of open files (`MSG_CTRUNC`). The test lowers the limit of its process,
//! so it is the only one in this file.
#![expect(clippy::unwrap_used, reason = "this is a test")]

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use baton_channel::message_socket::{ChannelError, MessageSocket};
use baton_channel::scm;
use baton_protocol::handover::wire::message::Message;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

fn send(socket: &MessageSocket, fds: &[BorrowedFd<'_>]) {
    let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let socket = socket.as_fd().as_raw_fd();
    sendmsg::<()>(socket, &[IoSlice::new(b"x")], &rights, MsgFlags::empty(), None).unwrap();
}

/// Runs `action` with a limit that lets this process open `more` descriptors.
fn with_room_for<T>(more: u64, action: impl FnOnce() -> T) -> T {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let next = File::open("/").unwrap().as_raw_fd();
    setrlimit(Resource::RLIMIT_NOFILE, u64::try_from(next).unwrap() + more, hard).unwrap();
    let result = action();
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    result
}

/// Returns how many descriptors of `file` this process has open.
fn count(file: &File) -> usize {
    let inode = file.metadata().unwrap().ino();
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    open.filter_map(|entry| std::fs::metadata(entry.unwrap().path()).ok())
        .filter(|metadata| metadata.ino() == inode)
        .count()
}

#[test]
fn descriptors_beyond_the_limit_are_reported_and_the_others_are_closed() {
    let (here, there) = MessageSocket::pair().unwrap();
    let file = tempfile::tempfile().unwrap();

    send(&here, &[file.as_fd(); 3]);
    let received = with_room_for(2, || scm::receive(&there, &mut [0; 8])).unwrap();
    assert!(received.fds_lost);
    assert_eq!((received.length, received.fds.len(), count(&file)), (1, 2, 3));
    drop(received);
    assert_eq!(count(&file), 1);

    send(&here, &[file.as_fd(); 3]);
    let error = with_room_for(2, || there.receive::<Message>(Duration::ZERO)).unwrap_err();
    assert!(matches!(error, ChannelError::FdsLost), "{error}");
    assert_eq!(count(&file), 1);

    send(&here, &[file.as_fd(); 3]);
    let received = scm::receive(&there, &mut [0; 8]).unwrap();
    assert_eq!((received.fds_lost, received.fds.len()), (false, 3));
}
