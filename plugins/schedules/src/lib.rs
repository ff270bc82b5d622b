//! Plugin workspace member `schedules`.
