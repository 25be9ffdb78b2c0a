//! Golden files: every message of every protocol, byte for byte. This version writes its messages as the golden files of the
//! newest protocol version have them, and reads the golden files of all versions. `BATON_GOLDEN=write` writes the files of
//! the newest versions.
#![expect(clippy::unwrap_used, reason = "these are tests")]

mod handover;
mod migration;
mod session;

use std::fmt::Debug;
use std::fs;
use std::path::{Path, PathBuf};

use baton_protocol::codec::Message;

/// The folder of one protocol version.
fn folder(protocol: &str, version: u16) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{protocol}-v{version}"))
}

/// Checks that each message is encoded as its golden file has it, and that there are no other files.
fn check_encoded<M: Message>(protocol: &str, messages: &[(&str, M)]) {
    let folder = folder(protocol, M::PROTOCOL.versions.newest);
    let write = std::env::var_os("BATON_GOLDEN").is_some_and(|value| value == "write");
    for (name, message) in messages {
        let path = folder.join(format!("{name}.bin"));
        let packet = message.encode().unwrap();
        if write {
            fs::create_dir_all(&folder).unwrap();
            fs::write(&path, &packet).unwrap();
        }
        assert_eq!(fs::read(&path).unwrap(), packet, "{}", path.display());
    }
    let files = fs::read_dir(folder).unwrap().count();
    assert_eq!(files, messages.len(), "a message has no golden file, or a file no message");
}

/// Checks that the golden files of each version are decoded to the messages.
fn check_decoded<M: Message + Debug + PartialEq>(protocol: &str, messages: &[(&str, M)]) {
    for version in M::PROTOCOL.versions.oldest..=M::PROTOCOL.versions.newest {
        for (name, message) in messages {
            let packet = fs::read(folder(protocol, version).join(format!("{name}.bin"))).unwrap();
            assert_eq!(M::decode(&packet).unwrap(), *message);
        }
    }
}
