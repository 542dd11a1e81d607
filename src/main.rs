//! Nothing runs yet: the library is being built room by room.

fn main() {}
