//! Decides whether only root, or a user that root chose, can have bound a socket at a path.
//!
//! A process of root sends guest memory and TAPs to a listener of any user, because the operator names its path. Where
//! any user can create that path, as in `/tmp`, the path proves nothing about the listener.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Mode bits that let users other than the owner create files in a directory.
const WRITABLE_BY_OTHERS: u32 = 0o022;
/// Mode bit: only the owner of a file or of the directory may remove or replace the file.
const STICKY: u32 = 0o1000;

/// Returns a component of `path` that `user` may have created without root's consent, or `None` if there is none.
///
/// Root consents to a component that root owns, in a directory where no other user can replace it, and to one that
/// `user` owns, in a directory that only root can write. In a directory of its own, `user` may create anything.
///
/// # Errors
/// Returns an error if the path cannot be resolved.
pub(crate) fn untrusted_component(path: &Path, user: u32) -> io::Result<Option<PathBuf>> {
    // Both the path as given, with its symbolic links, and the resolved path must be trusted.
    for path in [std::path::absolute(path)?, path.canonicalize()?] {
        if let Some(component) = untrusted_in(&path, user)? {
            return Ok(Some(component));
        }
    }
    Ok(None)
}

fn untrusted_in(path: &Path, user: u32) -> io::Result<Option<PathBuf>> {
    let mut components: Vec<&Path> = path.ancestors().collect();
    components.reverse();
    for pair in components.windows(2) {
        let [directory, component] = [pair[0], pair[1]];
        let owner = component.symlink_metadata()?.uid();
        let directory = directory.metadata()?;
        // Root consented to this directory of `user`, and so to everything in it.
        if directory.uid() == user && owner == user {
            continue;
        }
        let trusted = match owner {
            0 => is_roots(&directory, |mode| mode & WRITABLE_BY_OTHERS == 0 || mode & STICKY != 0),
            owner => owner == user && is_roots(&directory, |mode| mode & WRITABLE_BY_OTHERS == 0),
        };
        if !trusted {
            return Ok(Some(component.to_owned()));
        }
    }
    Ok(None)
}

fn is_roots(directory: &Metadata, allows: impl Fn(u32) -> bool) -> bool {
    directory.uid() == 0 && allows(directory.mode())
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, create_dir, set_permissions, write};
    use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};

    use nix::unistd::geteuid;

    use super::*;

    const USER: u32 = 65534;

    #[test]
    fn a_path_is_trusted_only_where_no_other_user_can_create_it() {
        if !geteuid().is_root() {
            eprintln!("skipped: only root can give files to other users");
            return;
        }
        let base = tempfile::tempdir().unwrap();
        // The mode of the upper directory, the owners of the socket's directory in it and of the socket.
        for (mode, directory_owner, socket_owner, trusted) in [
            (0o755, 0, 0, true),
            (0o755, 0, USER, true),
            (0o755, USER, USER, true),
            (0o1777, 0, USER, true),
            (0o1777, 0, 0, true),
            (0o1777, USER, USER, false),
            (0o777, 0, USER, false),
            (0o775, USER, USER, false),
            (0o755, USER - 1, USER, false),
            (0o755, 0, USER - 1, false),
        ] {
            let top = tempfile::tempdir_in(&base).unwrap();
            let directory = top.path().join("directory");
            create_dir(&directory).unwrap();
            let socket = directory.join("socket");
            write(&socket, "").unwrap();
            chown(&socket, Some(socket_owner), None).unwrap();
            set_permissions(&directory, Permissions::from_mode(0o755)).unwrap();
            chown(&directory, Some(directory_owner), None).unwrap();
            set_permissions(top.path(), Permissions::from_mode(mode)).unwrap();
            let found = untrusted_component(&socket, USER).unwrap();
            assert_eq!(found.is_none(), trusted, "{mode:o} {directory_owner} {socket_owner}: {found:?}");
        }
    }

    #[test]
    fn a_symbolic_link_of_another_user_is_not_trusted() {
        if !geteuid().is_root() {
            eprintln!("skipped: only root can give files to other users");
            return;
        }
        let base = tempfile::tempdir().unwrap();
        let users = base.path().join("users");
        create_dir(&users).unwrap();
        set_permissions(base.path(), Permissions::from_mode(0o755)).unwrap();
        write(users.join("socket"), "").unwrap();
        for path in [&users, &users.join("socket")] {
            chown(path, Some(USER), None).unwrap();
        }
        let public = base.path().join("public");
        create_dir(&public).unwrap();
        set_permissions(&public, Permissions::from_mode(0o1777)).unwrap();
        let link = public.join("link");
        symlink(&users, &link).unwrap();
        assert_eq!(untrusted_component(&link.join("socket"), USER).unwrap(), None);
        lchown(&link, Some(USER), None).unwrap();
        assert_eq!(untrusted_component(&link.join("socket"), USER).unwrap(), Some(link));
    }
}
