//! Listening Unix sockets with a path. Only the owner may connect, a socket in use is not replaced, and only the
//! process that owns the file unlinks it.
//!
//! A [`BoundSocket`] owns the listener and its file, unless another process has replaced the file. Both can move to
//! another process, which [adopts](BoundSocket::adopt) the socket and [takes](BoundSocket::own_file) the file that this
//! process [leaves](BoundSocket::leave_file).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, getsockname, getsockopt, listen, socket,
    sockopt,
};
use nix::sys::stat::{Mode, fchmod};

use crate::connect::connect;
use crate::retry::retry_while_in_use;

/// Why a socket was not bound. Every message names the path.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// A process listens at the path.
    #[error("{}: another process is listening on this socket; stop it or choose another path", path.display())]
    InUse {
        /// The requested path.
        path: PathBuf,
    },
    /// The path is not a socket.
    #[error("{}: exists and is not a socket; remove it or choose another path", path.display())]
    NotASocket {
        /// The requested path.
        path: PathBuf,
    },
    /// The path does not fit into a socket address (`sun_path`, 107 bytes).
    #[error("{}: the path is longer than 107 bytes; choose a shorter one", path.display())]
    TooLong {
        /// The requested path.
        path: PathBuf,
    },
    /// The descriptor is not the socket bound to the path.
    #[error("{}: the received socket does not listen on this path", path.display())]
    NotBound {
        /// The path.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("{}: cannot {step}", path.display())]
    Io {
        /// The requested path.
        path: PathBuf,
        /// What failed.
        step: &'static str,
        /// The error of the system call.
        source: io::Error,
    },
}

/// A file's identity: device and inode number.
type Identity = (u64, u64);

/// A listening Unix socket and its file, which is unlinked when this is dropped.
#[derive(Debug)]
pub struct BoundSocket {
    listener: UnixListener,
    path: PathBuf,
    /// `None` if this process does not own the file.
    identity: Option<Identity>,
}

impl BoundSocket {
    /// Like [`Self::bind`], for packets (`SOCK_SEQPACKET`).
    ///
    /// # Errors
    /// Same as [`Self::bind`].
    pub fn bind_packets(path: &Path) -> Result<Self, BindError> {
        Self::bind_as(path, SockType::SeqPacket)
    }

    /// Binds a stream socket to `path` and listens. The file is created with mode 0600, and the descriptor is
    /// close-on-exec. Replaces a stale socket file, and waits up to a second for one in use to become free
    /// ([`retry_while_in_use`]).
    ///
    /// # Errors
    /// Returns an error if a process still listens on the path, if the path is not a socket, or if a system call fails.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        Self::bind_as(path, SockType::Stream)
    }

    /// Like [`Self::bind`], but does not wait for a socket in use to become free.
    ///
    /// # Errors
    /// Same as [`Self::bind`].
    pub fn bind_at_once(path: &Path) -> Result<Self, BindError> {
        Self::try_bind(path, SockType::Stream)
    }

    /// Like [`Self::bind`], but replaces a socket on which another process may listen. A client can connect to one of
    /// the two at any time. The other process' socket has no file afterwards.
    ///
    /// # Errors
    /// Returns an error if the path is not a socket, or if a system call fails. The existing file is kept.
    pub fn bind_over(path: &Path) -> Result<Self, BindError> {
        let failed = |step, source: io::Error| BindError::Io { path: path.to_owned(), step, source };
        let path = std::path::absolute(path).map_err(|error| failed("resolve the path", error))?;
        match std::fs::symlink_metadata(&path) {
            Ok(metadata) if !metadata.file_type().is_socket() => return Err(BindError::NotASocket { path }),
            _ => {}
        }
        let mut beside = path.clone();
        beside.set_file_name(format!(".baton-{}", std::process::id()));
        let mut bound = Self::bind_as(&beside, SockType::Stream)?;
        // A renamed file keeps its inode, so `bound.identity` stays valid.
        std::fs::rename(&beside, &path).map_err(|error| failed("replace the socket", error))?;
        bound.path = path;
        Ok(bound)
    }

    /// Adopts a listening socket that another process bound to `path`. That process owns the file until
    /// [`Self::own_file`].
    ///
    /// # Errors
    /// Returns [`BindError::NotBound`] if the descriptor is not a socket that listens on `path`.
    pub fn adopt(listener: OwnedFd, path: &Path) -> Result<Self, BindError> {
        let not_bound = || BindError::NotBound { path: path.to_owned() };
        let listens = getsockopt(&listener, sockopt::AcceptConn) == Ok(true);
        let address = getsockname::<UnixAddr>(listener.as_raw_fd()).map_err(|_| not_bound())?;
        if !listens || address.path() != Some(path) {
            return Err(not_bound());
        }
        Ok(Self { listener: UnixListener::from(listener), path: path.to_owned(), identity: None })
    }

    /// Takes ownership of the file, which is then unlinked with this socket.
    ///
    /// # Errors
    /// Returns an error if the file cannot be inspected. It is then not unlinked.
    pub fn own_file(&mut self) -> Result<(), BindError> {
        let failed = |source| BindError::Io { path: self.path.clone(), step: "inspect the socket", source };
        self.identity = identity_of(&self.path).map_err(failed)?;
        Ok(())
    }

    /// Leaves the file to another process that has the socket. It is then not unlinked with this one.
    pub fn leave_file(&mut self) {
        self.identity = None;
    }

    fn bind_as(path: &Path, kind: SockType) -> Result<Self, BindError> {
        retry_while_in_use(|| Self::try_bind(path, kind), |error| matches!(error, BindError::InUse { .. }))
    }

    fn try_bind(path: &Path, kind: SockType) -> Result<Self, BindError> {
        let failed = |step, source: io::Error| BindError::Io { path: path.to_owned(), step, source };
        let path = std::path::absolute(path).map_err(|error| failed("resolve the path", error))?;
        let address = UnixAddr::new(&path).map_err(|_| BindError::TooLong { path: path.clone() })?;

        remove_stale(&path)?;

        let fd = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)
            .map_err(|errno| failed("create a socket", errno.into()))?;
        // bind(2) creates the file with the mode of the socket, less the umask. So other users can never connect.
        fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR).map_err(|errno| failed("set the mode", errno.into()))?;
        bind(fd.as_raw_fd(), &address).map_err(|errno| failed("bind the socket", errno.into()))?;
        let mut bound = Self { listener: UnixListener::from(fd), path, identity: None };
        bound.identity = identity_of(&bound.path).map_err(|error| failed("inspect the socket", error))?;
        listen(&bound.listener, Backlog::MAXCONN).map_err(|errno| failed("listen", errno.into()))?;
        Ok(bound)
    }

    /// Returns the listening socket, which is in blocking mode unless the caller changes that.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Returns the absolute path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for BoundSocket {
    /// Unlinks the file if it still belongs to this socket. While the socket is open, its inode is not reused.
    fn drop(&mut self) {
        if self.identity.is_none() || identity_of(&self.path).ok().flatten() != self.identity {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

/// Returns the identity of the file at `path`, without following a symbolic link, or `None` if there is no file.
fn identity_of(path: &Path) -> io::Result<Option<Identity>> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some((metadata.dev(), metadata.ino()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Removes the socket at `path` if no process listens on it. Any other file is an error.
fn remove_stale(path: &Path) -> Result<(), BindError> {
    let failed = |step, source: io::Error| BindError::Io { path: path.to_owned(), step, source };
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("inspect the path", error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(BindError::NotASocket { path: path.to_owned() });
    }

    let Err(error) = connect(path, SockType::Stream) else {
        return Err(BindError::InUse { path: path.to_owned() });
    };
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ECONNREFUSED) => {}
        Some(Errno::ENOENT) => return Ok(()),
        // EAGAIN: the listener's backlog is full. EPROTOTYPE: it listens for packets.
        Some(Errno::EAGAIN | Errno::EPROTOTYPE) => return Err(BindError::InUse { path: path.to_owned() }),
        _ => return Err(failed("determine whether the socket is in use", error)),
    }

    // Another process may have replaced the file since.
    match identity_of(path).map_err(|error| failed("inspect the path", error))? {
        None => Ok(()),
        Some(identity) if identity == (metadata.dev(), metadata.ino()) => {
            std::fs::remove_file(path).map_err(|error| failed("remove the stale socket", error))
        }
        Some(_) => Err(BindError::InUse { path: path.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn scratch() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        (directory, path)
    }

    #[test]
    fn only_the_owner_may_connect() {
        let (_directory, path) = scratch();
        let socket = BoundSocket::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(socket.path(), path);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn the_file_is_unlinked_with_the_socket() {
        let (_directory, path) = scratch();
        drop(BoundSocket::bind(&path).unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let (_directory, path) = scratch();
        // The standard library's listener leaves its file behind.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let _socket = BoundSocket::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_live_socket_is_refused() {
        let (_directory, path) = scratch();
        let live = UnixListener::bind(&path).unwrap();
        let error = BoundSocket::bind(&path).unwrap_err();
        assert!(matches!(error, BindError::InUse { .. }), "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()));
        drop(live);
        BoundSocket::bind(&path).unwrap();
    }

    #[test]
    fn bind_waits_for_a_socket_that_is_about_to_close() {
        let (_directory, path) = scratch();
        let dying = UnixListener::bind(&path).unwrap();
        let end = std::thread::spawn(move || {
            // Closes the listener after the first probe of `bind`.
            dying.accept().unwrap();
        });
        BoundSocket::bind(&path).unwrap();
        end.join().unwrap();
        let _live = UnixListener::bind(&path).unwrap();
        let error = BoundSocket::bind_at_once(&path).unwrap_err();
        assert!(matches!(error, BindError::InUse { .. }), "{error}");
    }

    #[test]
    fn a_live_packet_socket_is_refused_and_a_stale_one_is_replaced() {
        let (_directory, path) = scratch();
        let mut live = BoundSocket::bind_packets(&path).unwrap();
        for error in [BoundSocket::bind(&path).unwrap_err(), BoundSocket::bind_packets(&path).unwrap_err()] {
            assert!(matches!(error, BindError::InUse { .. }), "{error}");
        }
        // Closes the socket and leaves its file behind.
        live.identity = None;
        drop(live);
        assert!(path.exists());
        BoundSocket::bind_packets(&path).unwrap();
    }

    #[test]
    fn a_live_socket_with_a_full_backlog_is_refused() {
        let (_directory, path) = scratch();
        let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(fd.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&fd, Backlog::new(0).unwrap()).unwrap();
        let _waiting = UnixStream::connect(&path).unwrap();
        let error = BoundSocket::bind(&path).unwrap_err();
        assert!(matches!(error, BindError::InUse { .. }), "{error}");
    }

    #[test]
    fn a_file_that_is_not_a_socket_is_refused_and_kept() {
        let (directory, path) = scratch();
        std::fs::write(&path, "precious").unwrap();
        let error = BoundSocket::bind(&path).unwrap_err();
        assert!(matches!(error, BindError::NotASocket { .. }), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");

        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let error = BoundSocket::bind(&link).unwrap_err();
        assert!(matches!(error, BindError::NotASocket { .. }), "{error}");
    }

    #[test]
    fn a_file_of_another_socket_is_not_unlinked() {
        let (_directory, path) = scratch();
        let first = BoundSocket::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let second = BoundSocket::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
        UnixStream::connect(&path).unwrap();
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_and_its_file_can_move_to_another_owner() {
        let (_directory, path) = scratch();
        let mut first = BoundSocket::bind(&path).unwrap();
        let twin = || OwnedFd::from(first.listener().try_clone().unwrap());
        drop(BoundSocket::adopt(twin(), &path).unwrap());
        assert!(path.exists());
        let mut second = BoundSocket::adopt(twin(), &path).unwrap();
        first.leave_file();
        drop(first);
        assert!(path.exists());
        UnixStream::connect(&path).unwrap();
        second.listener().accept().unwrap();
        second.own_file().unwrap();
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn a_descriptor_that_does_not_listen_at_the_path_is_not_adopted() {
        let (directory, path) = scratch();
        let socket = BoundSocket::bind(&path).unwrap();
        let elsewhere = OwnedFd::from(socket.listener().try_clone().unwrap());
        let connected = OwnedFd::from(UnixStream::connect(&path).unwrap());
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        for (fd, path) in
            [(elsewhere, directory.path().join("other")), (connected, path.clone()), (file, path.clone())]
        {
            let error = BoundSocket::adopt(fd, &path).unwrap_err();
            assert!(matches!(error, BindError::NotBound { .. }), "{error}");
        }
        assert!(path.exists());
    }

    #[test]
    fn clients_connect_to_a_socket_that_replaced_another() {
        let (directory, path) = scratch();
        let first = BoundSocket::bind(&path).unwrap();
        let second = BoundSocket::bind_over(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        UnixStream::connect(&path).unwrap();
        second.listener().accept().unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());
        // Also works if there is no socket to replace.
        drop(BoundSocket::bind_over(&path).unwrap());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        std::fs::write(&path, "precious").unwrap();
        let error = BoundSocket::bind_over(&path).unwrap_err();
        assert!(matches!(error, BindError::NotASocket { .. }), "{error}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_path_that_is_too_long_is_refused() {
        let (directory, _) = scratch();
        let error = BoundSocket::bind(&directory.path().join("x".repeat(200))).unwrap_err();
        assert!(matches!(error, BindError::TooLong { .. }), "{error}");
    }

    #[test]
    fn an_error_for_a_missing_directory_names_the_path() {
        let (directory, _) = scratch();
        let path = directory.path().join("none").join("socket");
        let error = BoundSocket::bind(&path).unwrap_err();
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
}
