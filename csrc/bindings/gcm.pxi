# gcm
