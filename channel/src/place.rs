//! Whether the listener at a socket's path is the process that root meant.
//!
//! Root hands guest memory and TAPs to any user that listens at the path that the operator names. A path that any user
//! can take, in `/tmp` for example, names nobody in particular.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Mode bits that let others than the owner put files into a folder.
const WRITABLE_BY_OTHERS: u32 = 0o022;
/// Mode bit: only its owner, or the folder's, may remove or replace a file.
const STICKY: u32 = 0o1000;

/// A component of `path` that user `user` may have put there without root's doing; `None` if root chose each of them.
///
/// Root chose a component that is root's, in a folder where nobody else can replace it. Below a component that root
/// made for `user`, in a folder that only root writes, all is that user's to choose.
///
/// # Errors
/// What resolving the path fails with.
pub(crate) fn squatted(path: &Path, user: u32) -> io::Result<Option<PathBuf>> {
    // The path as it was given, symbolic links included, and what it resolves to.
    for path in [std::path::absolute(path)?, path.canonicalize()?] {
        if let Some(component) = squatted_component(&path, user)? {
            return Ok(Some(component));
        }
    }
    Ok(None)
}

fn squatted_component(path: &Path, user: u32) -> io::Result<Option<PathBuf>> {
    let mut components: Vec<&Path> = path.ancestors().collect();
    components.reverse();
    for pair in components.windows(2) {
        let [folder, component] = [pair[0], pair[1]];
        let owner = component.symlink_metadata()?.uid();
        let folder = folder.metadata()?;
        // Whatever is in the folder of `user`, that user put there: the user that root made the folder for.
        if folder.uid() == user && owner == user {
            continue;
        }
        let chosen = match owner {
            0 => is_roots(&folder, |mode| mode & WRITABLE_BY_OTHERS == 0 || mode & STICKY != 0),
            owner => owner == user && is_roots(&folder, |mode| mode & WRITABLE_BY_OTHERS == 0),
        };
        if !chosen {
            return Ok(Some(component.to_owned()));
        }
    }
    Ok(None)
}

fn is_roots(folder: &Metadata, allows: impl Fn(u32) -> bool) -> bool {
    folder.uid() == 0 && allows(folder.mode())
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, create_dir, set_permissions, write};
    use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};

    use nix::unistd::geteuid;

    use super::*;

    const USER: u32 = 65534;

    #[test]
    fn root_chose_a_place_only_where_no_other_user_could_have_taken_it() {
        if !geteuid().is_root() {
            eprintln!("skipped: only root can give files to other users");
            return;
        }
        let base = tempfile::tempdir().unwrap();
        // The folder that others may write, the owner of the socket's folder in it, and the socket's owner.
        for (mode, folder_owner, socket_owner, chosen) in [
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
            let folder = top.path().join("folder");
            create_dir(&folder).unwrap();
            let socket = folder.join("socket");
            write(&socket, "").unwrap();
            chown(&socket, Some(socket_owner), None).unwrap();
            set_permissions(&folder, Permissions::from_mode(0o755)).unwrap();
            chown(&folder, Some(folder_owner), None).unwrap();
            set_permissions(top.path(), Permissions::from_mode(mode)).unwrap();
            let found = squatted(&socket, USER).unwrap();
            assert_eq!(found.is_none(), chosen, "{mode:o} {folder_owner} {socket_owner}: {found:?}");
        }
    }

    #[test]
    fn a_link_that_another_user_made_names_no_place_of_roots() {
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
        assert_eq!(squatted(&link.join("socket"), USER).unwrap(), None);
        lchown(&link, Some(USER), None).unwrap();
        assert_eq!(squatted(&link.join("socket"), USER).unwrap(), Some(link));
    }
}
