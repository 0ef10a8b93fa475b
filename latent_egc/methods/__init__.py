"""What an explicit energy allows: functions of a potential U(z, t), whose input gradient is epsilon."""
