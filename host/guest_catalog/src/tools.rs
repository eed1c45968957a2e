//! Runs host programs (apt-get, dpkg-deb, pip, mmdebstrap, …) and turns their failures into errors that name the
//! package to install or show the program's last words. Called by [`crate::fetch`] and [`crate::prepare`].
//!
//! Invariants: programs run with a fixed locale and without a terminal; their output goes to a log in the work
//! folder, never to the user's screen.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::error::{CatalogError, IoContext};

/// A host program, what it is for and the Debian package that holds it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tool {
    pub(crate) program: &'static str,
    pub(crate) package: &'static str,
    pub(crate) purpose: &'static str,
}

pub(crate) const APT_GET: Tool = Tool { program: "apt-get", package: "apt", purpose: "download packages" };
pub(crate) const APT_CACHE: Tool = Tool { program: "apt-cache", package: "apt", purpose: "look packages up" };
pub(crate) const DPKG_DEB: Tool = Tool { program: "dpkg-deb", package: "dpkg", purpose: "unpack packages" };
pub(crate) const PYTHON: Tool =
    Tool { program: "python3", package: "python3-pip", purpose: "download and unpack a Python wheel" };
pub(crate) const MMDEBSTRAP: Tool =
    Tool { program: "mmdebstrap", package: "mmdebstrap", purpose: "build a Debian system" };
pub(crate) const MKE2FS: Tool =
    Tool { program: "mke2fs", package: "e2fsprogs", purpose: "make an ext4 filesystem" };
pub(crate) const SHELL: Tool = Tool { program: "sh", package: "dash", purpose: "run a build script" };
pub(crate) const GCC: Tool = Tool { program: "gcc", package: "gcc", purpose: "build Linux' selftests" };
pub(crate) const XZ: Tool =
    Tool { program: "xz", package: "xz-utils", purpose: "unpack the kernel's source" };

/// Where programs of the administrator live, which are missing from a user's PATH.
const MORE_FOLDERS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];
/// How much of a failed program's output is shown.
const TAIL_BYTES: usize = 1500;
const POLL: Duration = Duration::from_millis(100);

impl Tool {
    /// The program's path.
    pub(crate) fn find(self) -> Result<PathBuf, CatalogError> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path)
            .chain(MORE_FOLDERS.iter().map(PathBuf::from))
            .map(|folder| folder.join(self.program))
            .find(|candidate| candidate.is_file())
            .ok_or(CatalogError::ToolMissing {
                program: self.program,
                purpose: self.purpose,
                package: self.package,
            })
    }

    /// A command that runs it, arguments to be added.
    pub(crate) fn command(self) -> Result<Command, CatalogError> {
        let mut command = Command::new(self.find()?);
        command.env("LC_ALL", "C.UTF-8").env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
        Ok(command)
    }
}

/// Runs to the end, calling `meanwhile` now and then, with the output in `log`.
pub(crate) fn run(
    mut command: Command,
    log: &Path,
    hint: &str,
    meanwhile: &mut dyn FnMut(),
) -> Result<(), CatalogError> {
    let out = File::create(log).context("create", log)?;
    let err = out.try_clone().context("create", log)?;
    let program = PathBuf::from(command.get_program());
    let child = command.stdout(out).stderr(err).spawn().context("run", &program)?;
    let mut child = Reaped(child);
    loop {
        if let Some(status) = child.0.try_wait().context("wait for", &program)? {
            if status.success() {
                return Ok(());
            }
            let output = fs::read(log).unwrap_or_default();
            return Err(CatalogError::ToolFailed {
                command: describe(&command),
                status: status.to_string(),
                output: tail(&output),
                hint: hint.to_string(),
            });
        }
        meanwhile();
        std::thread::sleep(POLL);
    }
}

/// Runs to the end and gives its standard output.
pub(crate) fn output(mut command: Command, hint: &str) -> Result<String, CatalogError> {
    let program = PathBuf::from(command.get_program());
    let done = command.output().context("run", &program)?;
    if !done.status.success() {
        return Err(CatalogError::ToolFailed {
            command: describe(&command),
            status: done.status.to_string(),
            output: tail(&[done.stdout, done.stderr].concat()),
            hint: hint.to_string(),
        });
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// A child that does not outlive a panic or an early return.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

fn describe(command: &Command) -> String {
    let program =
        Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let arguments = command.get_args().map(|a| a.to_string_lossy().into_owned());
    std::iter::once(program).chain(arguments).collect::<Vec<_>>().join(" ")
}

fn tail(output: &[u8]) -> String {
    let start = output.len().saturating_sub(TAIL_BYTES);
    String::from_utf8_lossy(&output[start..]).trim().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_names_its_package() {
        let tool = Tool { program: "no-such-program", package: "some-package", purpose: "do things" };
        let message = tool.find().unwrap_err().to_string();
        assert!(message.contains("apt-get install some-package"), "{message}");
    }

    #[test]
    fn a_failure_shows_the_last_words_and_the_hint() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = SHELL.command().unwrap();
        command.args(["-c", "echo first; echo the reason >&2; exit 3"]);
        let message =
            run(command, &folder.path().join("log"), "try again", &mut || {}).unwrap_err().to_string();
        assert!(
            message.contains("the reason") && message.contains("try again") && message.contains('3'),
            "{message}"
        );
    }

    #[test]
    fn output_is_given_back() {
        let mut command = SHELL.command().unwrap();
        command.args(["-c", "echo $LC_ALL"]);
        assert_eq!(output(command, "").unwrap(), "C.UTF-8\n");
    }
}
