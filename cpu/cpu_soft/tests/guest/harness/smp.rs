//! Several vCPUs in threads of their own.
