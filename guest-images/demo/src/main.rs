//! Demo service.
fn main() {}
