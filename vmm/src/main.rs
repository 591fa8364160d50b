//! The monitor program.
fn main() {}
