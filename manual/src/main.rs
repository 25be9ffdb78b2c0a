//! `baton-manual`: writes the man pages and the shell completions of all programs, from their command-line definitions.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser};
use clap_complete::Shell;

/// Write the man pages and shell completions of baton-backend, baton-vmm and batonctl
#[derive(Debug, Parser)]
struct Arguments {
    /// Write the pages to DIR/man1 and the completions to DIR/completions
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

fn main() -> Result<()> {
    write_all(&Arguments::parse().directory)
}

fn write_all(directory: &Path) -> Result<()> {
    let (pages, completions) = (directory.join("man1"), directory.join("completions"));
    for directory in [&pages, &completions] {
        fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    }
    let programs = [
        baton_backend::args::Args::command(),
        baton_vmm::config::Config::command(),
        baton_control::command_line::Arguments::command(),
    ];
    for program in programs {
        // A page of its own for each command, such as batonctl-handover(1).
        clap_mangen::generate_to(program.clone().disable_help_subcommand(true), &pages)
            .with_context(|| format!("cannot write pages to {}", pages.display()))?;
        for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
            let name = program.get_name().to_owned();
            clap_complete::generate_to(shell, &mut program.clone(), name, &completions)
                .with_context(|| format!("cannot write completions to {}", completions.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_and_command_has_a_page_with_its_options() {
        let directory = tempfile::tempdir().unwrap();
        write_all(directory.path()).unwrap();
        let page = |name: &str| fs::read_to_string(directory.path().join("man1").join(name)).unwrap();
        // roff writes "-" as "\-".
        assert!(page("baton-backend.1").contains("\\-\\-incoming\\-fds"));
        assert!(page("baton-vmm.1").contains("\\-\\-incoming"));
        assert!(page("batonctl.1").contains("handover"));
        assert!(page("batonctl-handover.1").contains("\\-\\-on\\-suspend"));
        let completions = fs::read_dir(directory.path().join("completions")).unwrap().count();
        assert_eq!(completions, 9, "three programs, three shells");
    }
}
