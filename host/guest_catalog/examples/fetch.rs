//! Prepares guests by name and prints where they are: `cargo run -p guest_catalog --example fetch -- cloud`.

use guest_catalog::{Cache, CatalogError, Progress};

struct Lines;

impl Progress for Lines {
    fn step(&mut self, title: &str, total: Option<u64>) {
        match total {
            Some(bytes) => eprintln!("{title} ({} MB)", bytes / 1_000_000),
            None => eprintln!("{title}"),
        }
    }

    fn at(&mut self, _done: u64) {}

    fn note(&mut self, text: &str) {
        eprintln!("note: {text}");
    }
}

fn main() -> Result<(), CatalogError> {
    let cache = Cache::of_user()?;
    for name in std::env::args().skip(1) {
        let prepared = cache.fetch(guest_catalog::find(&name)?, &mut Lines)?;
        println!("{name}: {} in {}", prepared.version, prepared.folder.display());
    }
    Ok(())
}
