//! Plugin workspace member `abi`.
