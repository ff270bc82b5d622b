//! Plugin workspace member `sdk`.
