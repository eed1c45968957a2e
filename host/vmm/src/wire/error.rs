//! What can be wrong with a spec: which file, which field, and the way out.

use std::fmt::Display;
use std::path::PathBuf;

/// See the module's header.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The spec file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The spec file is not what we understand; the text has line, column and field.
    #[error("{}: {source}", path.display())]
    Toml {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        source: Box<toml::de::Error>,
    },
    /// A field of the spec file has a value that cannot be.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Which field, and what is wrong with it.
        source: Box<SpecError>,
    },
    /// A field has a value that the machine cannot have.
    #[error(transparent)]
    Machine(#[from] machine_spec::SpecError),
    /// A field has a value that cannot be.
    #[error("{field} = `{value}`: {way_out}")]
    Field {
        /// Its name, with dots.
        field: &'static str,
        /// Its value.
        value: String,
        /// What to write instead.
        way_out: String,
    },
}

impl SpecError {
    /// A [`SpecError::Field`].
    pub fn field(field: &'static str, value: impl Display, way_out: impl Into<String>) -> Self {
        Self::Field { field, value: value.to_string(), way_out: way_out.into() }
    }
}
