"""A ``nn.Sequential`` that finds chains of convolutions among its children at every call, and runs each as one."""
