//! Writes an initramfs: a cpio archive in the `newc` format (the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst`). Needs neither external tools nor root.
//!
//! The archive is not compressed, because an emulated processor decompresses slowly.

use std::collections::BTreeSet;

/// An archive under construction. Paths are relative to the root. Adding a path again has no effect.
#[derive(Debug, Default)]
pub(super) struct Cpio {
    bytes: Vec<u8>,
    paths: BTreeSet<String>,
}

const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

impl Cpio {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn folder(&mut self, path: &str) {
        self.entry(path, FOLDER | 0o755, &[], (0, 0));
    }

    /// Adds a file and its parent directories.
    pub(super) fn file(&mut self, path: &str, mode: u32, contents: &[u8]) {
        for (end, _) in path.match_indices('/') {
            self.folder(&path[..end]);
        }
        self.entry(path, FILE | mode, contents, (0, 0));
    }

    pub(super) fn link(&mut self, path: &str, to: &str) {
        self.entry(path, LINK | 0o777, to.as_bytes(), (0, 0));
    }

    pub(super) fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, CHARACTER_DEVICE | 0o600, &[], (major, minor));
    }

    /// Returns the archive.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, contents: &[u8], device: (u32, u32)) {
        if !self.paths.insert(path.to_owned()) {
            return;
        }
        let inode = self.paths.len();
        let (links, owner, group, time) = (1, 0, 0, 0);
        let header = format!(
            "070701{inode:08x}{mode:08x}{owner:08x}{group:08x}{links:08x}{time:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}",
            contents.len(),
            0,
            0,
            device.0,
            device.1,
            path.len() + 1,
            0
        );
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
