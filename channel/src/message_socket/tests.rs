//! Valid and invalid messages with descriptors between the two ends of a socket.

use std::io::Write;
use std::os::unix::net::UnixStream;

use baton_protocol::codec::Protocol;
use baton_protocol::version::Versions;
use serde::{Deserialize, Serialize};

use super::*;

const PROTOCOL: Protocol =
    Protocol { magic: *b"TEST", versions: Versions { oldest: 1, newest: 1 }, max_body: 100_000 };
const SOON: Duration = Duration::from_millis(20);
const LONG: Duration = Duration::from_secs(30);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Text {
    text: String,
}

baton_protocol::messages! {
    #[derive(Clone, Debug, PartialEq)]
    enum Said: PROTOCOL {
        Text(Text) = 1 "TEXT",
    }
}

fn said(text: &str) -> Said {
    Said::Text(Text { text: text.to_owned() })
}

fn pairs() -> [(MessageSocket, MessageSocket); 2] {
    let (here, there) = UnixStream::pair().unwrap();
    let stream = [here, there].map(|end| MessageSocket::try_from(OwnedFd::from(end)).unwrap());
    let [here, there] = stream;
    [MessageSocket::pair().unwrap(), (here, there)]
}

/// Returns how many descriptors of the file with this inode number this process has open.
fn holders(inode: u64) -> usize {
    use std::os::unix::fs::MetadataExt;
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    open.filter_map(|entry| std::fs::metadata(entry.unwrap().path()).ok())
        .filter(|metadata| metadata.ino() == inode)
        .count()
}

fn inode(fd: &std::fs::File) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fd.metadata().unwrap().ino()
}

#[test]
fn messages_arrive_whole_and_in_order_with_their_descriptors() {
    for (here, there) in pairs() {
        let file = tempfile::tempfile().unwrap();
        here.send(&said("one"), &[file.as_fd(), file.as_fd()], LONG).unwrap();
        here.send(&said("two"), &[], LONG).unwrap();
        let packet = there.receive::<Said>(LONG).unwrap();
        assert_eq!(packet.message, said("one"));
        assert_eq!(packet.fds.len(), 2);
        assert_eq!(holders(inode(&file)), 3);
        drop(packet);
        let packet = there.receive::<Said>(LONG).unwrap();
        assert_eq!((packet.message, packet.fds.len()), (said("two"), 0));
    }
}

#[test]
fn the_sender_is_known_if_either_end_enabled_credentials() {
    let (here, there) = MessageSocket::pair().unwrap();
    let file = tempfile::tempfile().unwrap();
    let all = vec![file.as_fd(); MAX_FDS];
    here.send(&said("without"), &all, LONG).unwrap();
    here.send_with_credentials(&said("with"), &all, LONG).unwrap();
    let (packet, sender) = there.receive_with_credentials::<Said>(LONG).unwrap();
    assert_eq!((packet.message, packet.fds.len(), sender), (said("without"), MAX_FDS, None));
    let (packet, sender) = there.receive_with_credentials::<Said>(LONG).unwrap();
    assert_eq!((packet.message, packet.fds.len()), (said("with"), MAX_FDS));
    let own = i32::try_from(std::process::id()).unwrap();
    assert_eq!(sender.unwrap().pid, own);
    // The receiver has enabled credentials by now.
    here.send(&said("noted"), &[], LONG).unwrap();
    let (packet, sender) = there.receive_with_credentials::<Said>(LONG).unwrap();
    assert_eq!((packet.message, sender.unwrap().pid), (said("noted"), own));
}

#[test]
fn calls_wait_no_longer_than_their_patience() {
    for (here, there) in pairs() {
        for patience in [Duration::ZERO, SOON] {
            let error = there.receive::<Said>(patience).unwrap_err();
            assert!(matches!(error, ChannelError::Timeout), "{error}");
        }
        let large = said(&"x".repeat(90_000));
        let error = std::iter::repeat_with(|| here.send(&large, &[], SOON)).find_map(Result::err).unwrap();
        assert!(matches!(error, ChannelError::Timeout), "{error}");
    }
}

#[test]
fn a_closed_connection_is_reported_as_closed() {
    for (here, there) in pairs() {
        drop(here);
        let error = there.receive::<Said>(LONG).unwrap_err();
        assert!(matches!(error, ChannelError::Closed), "{error}");
        let error = there.send(&said(""), &[], LONG).unwrap_err();
        assert!(matches!(error, ChannelError::Closed), "{error}");
    }
}

#[test]
fn messages_sent_before_a_reset_are_received() {
    for (here, there) in pairs() {
        there.send(&said("unread"), &[], LONG).unwrap();
        here.send(&said("last"), &[], LONG).unwrap();
        drop(here);
        assert_eq!(there.receive::<Said>(LONG).unwrap().message, said("last"));
        let error = there.receive::<Said>(LONG).unwrap_err();
        assert!(matches!(error, ChannelError::Closed), "{error}");
    }
}

#[test]
fn an_end_that_stopped_sending_still_receives() {
    for (here, there) in pairs() {
        here.send(&said("last"), &[], LONG).unwrap();
        here.shutdown_write();
        assert_eq!(there.receive::<Said>(LONG).unwrap().message, said("last"));
        let error = there.receive::<Said>(LONG).unwrap_err();
        assert!(matches!(error, ChannelError::Closed), "{error}");
        there.send(&said("answer"), &[], LONG).unwrap();
        assert_eq!(here.receive::<Said>(LONG).unwrap().message, said("answer"));
        drop(there);
        here.shutdown_write();
    }
}

#[test]
fn an_incomplete_message_is_not_received() {
    let [_, (here, there)] = pairs();
    let packet = said("half").encode().unwrap();
    let mut here = UnixStream::from(OwnedFd::from(here));
    here.write_all(&packet[..packet.len() - 1]).unwrap();
    let error = there.receive::<Said>(SOON).unwrap_err();
    assert!(matches!(error, ChannelError::Timeout), "{error}");
    drop(here);
    let error = there.receive::<Said>(LONG).unwrap_err();
    assert!(matches!(error, ChannelError::Closed), "{error}");
}

#[test]
fn descriptors_of_a_refused_message_are_closed() {
    for (here, there) in pairs() {
        let file = tempfile::tempfile().unwrap();
        let rights = [file.as_raw_fd()];
        let garbage = [IoSlice::new(&[0xee; 40])];
        sendmsg::<()>(
            here.as_fd().as_raw_fd(),
            &garbage,
            &[ControlMessage::ScmRights(&rights)],
            MsgFlags::empty(),
            None,
        )
        .unwrap();
        let error = there.receive::<Said>(LONG).unwrap_err();
        assert!(matches!(error, ChannelError::Codec(CodecError::Magic(_))), "{error}");
        assert_eq!(holders(inode(&file)), 1);
    }
}

#[test]
fn a_packet_that_is_too_long_is_refused() {
    let [(here, there), _] = pairs();
    let long = vec![0; HEADER + PROTOCOL.max_body + 2];
    nix::unistd::write(&here, &long).unwrap();
    let error = there.receive::<Said>(LONG).unwrap_err();
    assert!(matches!(error, ChannelError::Codec(CodecError::TooLong { .. })), "{error}");
}

#[test]
fn a_message_carries_at_most_the_maximum_of_descriptors() {
    for (here, there) in pairs() {
        let file = tempfile::tempfile().unwrap();
        let mut fds = vec![file.as_fd(); MAX_FDS];
        here.send(&said("all"), &fds, LONG).unwrap();
        assert_eq!(there.receive::<Said>(LONG).unwrap().fds.len(), MAX_FDS);
        fds.push(file.as_fd());
        let error = here.send(&said("more"), &fds, LONG).unwrap_err();
        assert!(matches!(error, ChannelError::TooManyFds), "{error}");
    }
}

#[test]
fn only_unix_packet_and_stream_sockets_are_accepted() {
    let (read, _write) = nix::unistd::pipe().unwrap();
    let datagram = std::os::unix::net::UnixDatagram::unbound().unwrap();
    let network = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    for fd in [read, datagram.into(), network.into(), tempfile::tempfile().unwrap().into()] {
        let error = MessageSocket::try_from(fd).unwrap_err();
        assert!(matches!(error, ChannelError::NotUnix), "{error}");
    }
}
