"Which feature maps of a network are read, and how."
