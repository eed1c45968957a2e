//! Plays a file that a fuzzer left: `cargo run -p hostile --example replay -- TARGET FILE`.
#![forbid(unsafe_code)]

fn main() {
    let mut words = std::env::args().skip(1);
    let (target, file) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let names = hostile::TARGETS.map(|(name, _)| name).join(", ");
    let Some((_, run)) = hostile::TARGETS.iter().find(|(name, _)| *name == target) else {
        panic!("`{target}` is no target; there are {names}");
    };
    run(&std::fs::read(&file).unwrap_or_else(|error| panic!("{file}: {error}")));
    println!("{target}: nothing wrong");
}
